"""A real use of batched multi-LoRA: one frozen MiniLM for 64 users, each with an adapter and a head of its own."""

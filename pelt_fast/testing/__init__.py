"""What tests and benchmarks share: the cases, the oracle and the tolerance. No product code imports it."""

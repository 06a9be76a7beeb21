"""UniPELT's protocol on the texts that packages ship: every method's accuracy and cost, eager and accelerated."""

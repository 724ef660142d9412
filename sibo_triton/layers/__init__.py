"""A layer with adapters in a forward, of any SIBO method: its h0 and lambda, its siblings, obstacles to fusing."""

"""What PEFT's injection of an adapter does for all SIBO methods: which modules mix, binding h0, undoing refusals."""

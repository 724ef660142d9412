"""What all SIBO methods share when PEFT injects an adapter: decide which modules mix, bind h0, undo what is refused."""

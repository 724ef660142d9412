"""What every SIBO method does when PEFT injects an adapter: decide which modules mix, bind h0, undo what is refused."""

"""The joint training: phases, losses, starts, the jitted step and the loop."""

"""Load on a server: when requests come, how long they are, what their answers' times say, and the highest rate that meets an SLO."""

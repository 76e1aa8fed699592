"""Methods that split graphs: into supernodes and superedges (SSumM), or a walk into steps (PowerWalk)."""

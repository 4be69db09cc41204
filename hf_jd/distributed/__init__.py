"""Many processes: their rows -> one Gramian, and one update that is the same everywhere.

Every process makes the same collective calls in the same order, whatever its batch holds. Forward and backward passes
run under `no_sync`, so the reducers of DDP and FSDP never act, and what is exchanged is exchanged here.
"""

"""Many processes: their rows -> one Gramian, and one update that is the same everywhere.

Every process makes the same collective calls in the same order, whatever its batch holds. Forward and backward passes
run under `no_sync`, so the wrappers' reducers never act: all communication happens here.
"""

"""Many runs: finding, choosing, comparing, exporting, checking and pruning what single runs have left in their folders."""

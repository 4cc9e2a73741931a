"""Many runs from one recipe: its grid, its plan and cost, who trains what, one after another or several as one."""

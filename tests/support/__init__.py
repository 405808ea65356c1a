"""What tests share: small inputs and runs, stand-ins, processes and measures of numerics."""

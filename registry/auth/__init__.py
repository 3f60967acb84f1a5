"""Who a caller is (authentication) and what they may do (policy)."""

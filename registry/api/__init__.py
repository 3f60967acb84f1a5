"""HTTP only: parse the request, call HostedRegistry once, form the reply."""

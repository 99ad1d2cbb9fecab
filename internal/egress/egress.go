// Package egress is the way out of the mesh: it takes CONNECT from workloads
// on their SVIDs, has each one judged, dials only addresses that it resolved
// and screened itself, and relays when the TLS server name is the one allowed.
// Hosts whose destination says so it asks itself, request by request.
//
// It does not decide who may go where (internal/authz) nor keep records
// (internal/audit). Serve owns one goroutine per connection and two per
// tunnel; all of them end when Drain returns.
package egress

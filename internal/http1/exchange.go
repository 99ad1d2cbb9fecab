package http1

import "time"

// An Exchange forwards one request from Down to Up and its response back. Keep
// one for the life of a downstream connection and set the fields anew for each
// request.
type Exchange struct {
	// Down is the client's connection, from which Request was read.
	Down *Conn
	// Up is the connection to the upstream.
	Up *Conn
	// Request is the head that was read from Down.
	Request *Request
	// ToUp and ToDown change the two heads.
	ToUp, ToDown Edit
	// Timeout is how long to wait for the response head, counted from the end
	// of the request. Default: the BodyTimeout of Up.
	Timeout time.Duration
	// Accept, when set, sees the final response before any of it is written.
	// On false Run stops with ErrNotAccepted; Up is then to be closed.
	Accept func(*Response) bool

	// Response is the final response head, valid until Up is used again.
	Response Response
}

// Result says what an exchange did, also when it failed.
type Result struct {
	// Status of the final response; 0 when none was read.
	Status int
	// ReqBytes and RespBytes are body bytes, without framing.
	ReqBytes, RespBytes int64
	// RequestBytesSent counts bytes, head included, handed to Up. Above zero
	// the upstream may have acted on the request.
	RequestBytesSent int64
	// ResponseSeen says that Up sent at least one byte. Without it, an
	// upstream error on a pooled connection most likely means that the upstream had closed
	// it before.
	ResponseSeen bool
	// ResponseStarted says that bytes of the final response were written to
	// Down; without it the caller may still answer with WriteError.
	ResponseStarted bool
	// Replayable says that Run may be called again with another Up.
	Replayable bool
	// UpstreamReusable says that Up may be pooled.
	UpstreamReusable bool
	// DownstreamReusable says that Down may carry the next request. If not,
	// close it with Linger.
	DownstreamReusable bool
	// Upgraded says that 101 was passed on: Relay both connections now.
	Upgraded bool
}

package proxy

import (
	"cmp"
	"time"

	"sallyport/internal/http1"
	"sallyport/internal/http2"
)

// firstMessage is how long the head of an answer of gRPC may take. A server may
// send it with its first message, for which a client may wait long; how long, it
// says itself (grpc-timeout), and breaks the call off then.
func (l *listener) firstMessage() time.Duration {
	return max(cmp.Or(l.Limits.BodyTimeout, 5*time.Minute), l.Limits.ResponseTimeout)
}

// speaksGRPC says whether the caller of x reads refusals of gRPC. The type of a
// body proves nothing: to a client of plain HTTP/1.1, which may send any, the 200
// that such a refusal is would be a yes. One of gRPC takes trailers, or speaks
// HTTP/2 to us.
func (x *call) speaksGRPC() bool {
	_, lane := x.conn.Conn.(*http2.Lane)
	return (lane || x.req.TETrailers) && http1.IsGRPC(x.req.Get("content-type"))
}

// saidGRPC keeps the status of a call of gRPC, as long as what it stands in is
// ours.
func (x *call) saidGRPC() {
	if !x.speaksGRPC() {
		return
	}
	b := x.ex.Response.Get("grpc-status")
	if b == nil {
		b = x.ex.Trailer("grpc-status")
	}
	code, ok := grpcCode(b)
	if !ok {
		code = http1.GRPCUnknown
	}
	x.grpc = grpcText(code)
}

// grpcText is a code in decimals.
func grpcText(code int) string { return grpcTexts[code] }

var grpcTexts = [...]string{"0", "1", "2", "3", "4", "5", "6", "7", "8", "9", "10", "11", "12", "13", "14", "15", "16"}

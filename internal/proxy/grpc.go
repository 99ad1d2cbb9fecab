package proxy

import (
	"cmp"
	"fmt"
	"net/http"
	"time"

	"sallyport/internal/http2"
)

// isGRPC says whether a request is a call of gRPC, whose client reads a status
// of gRPC and nothing of a body in JSON.
func isGRPC(contentType []byte) bool {
	const name = "application/grpc"
	if len(contentType) < len(name) || !is(contentType[:len(name)], name) {
		return false
	}
	return len(contentType) == len(name) || contentType[len(name)] == '+' || contentType[len(name)] == ';'
}

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
	return (lane || x.req.TETrailers) && isGRPC(x.req.Get("content-type"))
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
		code = grpcUnknown
	}
	x.grpc = grpcText(code)
}

// grpcText is a code in decimals.
func grpcText(code int) string { return grpcTexts[code] }

var grpcTexts = [...]string{"0", "1", "2", "3", "4", "5", "6", "7", "8", "9", "10", "11", "12", "13", "14", "15", "16"}

// Codes of gRPC.
const (
	grpcUnknown           = 2
	grpcDeadlineExceeded  = 4
	grpcPermissionDenied  = 7
	grpcResourceExhausted = 8
	grpcUnimplemented     = 12
	grpcInternal          = 13
	grpcUnavailable       = 14
	grpcUnauthenticated   = 16
)

// grpcStatus is the status of gRPC for an answer of ours. Where the table of
// gRPC is for proxies that know nothing of it, ours says more: 429 is a limit,
// 504 a deadline, 421 names a service that is not here.
func grpcStatus(status int) int {
	switch status {
	case http.StatusBadRequest, http.StatusInternalServerError:
		return grpcInternal
	case http.StatusUnauthorized:
		return grpcUnauthenticated
	case http.StatusForbidden:
		return grpcPermissionDenied
	case http.StatusNotFound, http.StatusMethodNotAllowed, http.StatusMisdirectedRequest, http.StatusNotImplemented:
		return grpcUnimplemented
	case http.StatusRequestTimeout, http.StatusGatewayTimeout:
		return grpcDeadlineExceeded
	case http.StatusTooManyRequests, http.StatusRequestHeaderFieldsTooLarge, http.StatusRequestEntityTooLarge:
		return grpcResourceExhausted
	case http.StatusBadGateway, http.StatusServiceUnavailable:
		return grpcUnavailable
	}
	return grpcUnknown
}

// appendGRPC appends what a refused call of gRPC is answered with: trailers
// only, which stand in the head (PROTOCOL-HTTP2 of gRPC, "Responses").
func appendGRPC(head []byte, kind string, status int, detail string) []byte {
	head = fmt.Appendf(head, "Content-Type: %s\r\nGrpc-Status: %d\r\nGrpc-Message: ", kind, grpcStatus(status))
	for i := range len(detail) {
		if c := detail[i]; c < ' ' || c > '~' || c == '%' {
			head = fmt.Appendf(head, "%%%02X", c)
		} else {
			head = append(head, c)
		}
	}
	return append(head, '\r', '\n')
}

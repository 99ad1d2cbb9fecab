package http1

import (
	"fmt"
	"net/http"
)

// IsGRPC says whether a message of this type is of a call of gRPC, whose client
// reads a status of gRPC and nothing of a body in JSON.
func IsGRPC(contentType []byte) bool {
	const name = "application/grpc"
	if len(contentType) < len(name) || !equalFoldLen(contentType[:len(name)], name) {
		return false
	}
	return len(contentType) == len(name) || contentType[len(name)] == '+' || contentType[len(name)] == ';'
}

// Codes of gRPC.
const (
	GRPCUnknown           = 2
	GRPCDeadlineExceeded  = 4
	GRPCPermissionDenied  = 7
	GRPCResourceExhausted = 8
	GRPCUnimplemented     = 12
	GRPCInternal          = 13
	GRPCUnavailable       = 14
	GRPCUnauthenticated   = 16
)

// GRPCStatus is the status of gRPC for an answer of ours. Where the table of
// gRPC is for proxies that know nothing of it, ours says more: 429 is a limit,
// 504 a deadline, 421 names a service that is not here.
func GRPCStatus(status int) int {
	switch status {
	case http.StatusBadRequest, http.StatusInternalServerError:
		return GRPCInternal
	case http.StatusUnauthorized:
		return GRPCUnauthenticated
	case http.StatusForbidden:
		return GRPCPermissionDenied
	case http.StatusNotFound, http.StatusMethodNotAllowed, http.StatusMisdirectedRequest, http.StatusNotImplemented:
		return GRPCUnimplemented
	case http.StatusRequestTimeout, http.StatusGatewayTimeout:
		return GRPCDeadlineExceeded
	case http.StatusTooManyRequests, http.StatusRequestHeaderFieldsTooLarge, http.StatusRequestEntityTooLarge:
		return GRPCResourceExhausted
	case http.StatusBadGateway, http.StatusServiceUnavailable:
		return GRPCUnavailable
	}
	return GRPCUnknown
}

// AppendGRPC appends what a refused call of gRPC is answered with: trailers
// only, which stand in the head (PROTOCOL-HTTP2 of gRPC, "Responses").
func AppendGRPC(head []byte, kind string, status int, detail string) []byte {
	head = fmt.Appendf(head, "Content-Type: %s\r\nGrpc-Status: %d\r\nGrpc-Message: ", kind, GRPCStatus(status))
	for i := range len(detail) {
		if c := detail[i]; c < ' ' || c > '~' || c == '%' {
			head = fmt.Appendf(head, "%%%02X", c)
		} else {
			head = append(head, c)
		}
	}
	return append(head, '\r', '\n')
}

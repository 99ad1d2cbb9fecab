package http1

import (
	"errors"
	"fmt"
	"net/http"
	"os"
)

// ErrHeadTimeout is returned when a head was begun but not finished in time.
// The fitting answer is 408 (RFC 9110 section 15.5.9).
var ErrHeadTimeout = errors.New("head not complete in time")

// ErrIdleTimeout is returned when nothing at all came in time. Before a
// request it means an idle connection to close without an answer; before a
// response it means that the upstream did not answer (504).
var ErrIdleTimeout = errors.New("nothing received in time")

// ErrSlowBody is returned when a body moves below Limits.MinRate or
// Limits.ChunkedRate.
var ErrSlowBody = errors.New("body arrives too slowly")

// Reason says what was wrong with a message. The set is closed: its text is
// a metric label and an audit field.
type Reason uint8

// The reasons, in the order in which a head is read.
const (
	ReasonNone Reason = iota
	ReasonHeadTooLarge
	ReasonTooManyFields
	ReasonLineEnding
	ReasonStartLine
	ReasonMethod
	ReasonVersion
	ReasonTarget
	ReasonTargetTooLong
	ReasonPath
	ReasonAuthority
	ReasonHost
	ReasonFieldName
	ReasonFieldValue
	ReasonFolded
	ReasonDuplicate
	ReasonContentLength
	ReasonTransferEncoding
	ReasonFraming
	ReasonConnection
	ReasonExpect
	ReasonUpgrade
	ReasonChunk
	ReasonTrailer
	ReasonStatus
	ReasonInterim
	reasonCount
)

var reasonText = [reasonCount]string{
	ReasonNone:             "none",
	ReasonHeadTooLarge:     "head_too_large",
	ReasonTooManyFields:    "too_many_fields",
	ReasonLineEnding:       "line_ending",
	ReasonStartLine:        "start_line",
	ReasonMethod:           "method",
	ReasonVersion:          "version",
	ReasonTarget:           "target",
	ReasonTargetTooLong:    "target_too_long",
	ReasonPath:             "path",
	ReasonAuthority:        "authority",
	ReasonHost:             "host",
	ReasonFieldName:        "field_name",
	ReasonFieldValue:       "field_value",
	ReasonFolded:           "folded_field",
	ReasonDuplicate:        "duplicate_field",
	ReasonContentLength:    "content_length",
	ReasonTransferEncoding: "transfer_encoding",
	ReasonFraming:          "framing",
	ReasonConnection:       "connection",
	ReasonExpect:           "expect",
	ReasonUpgrade:          "upgrade",
	ReasonChunk:            "chunk",
	ReasonTrailer:          "trailer",
	ReasonStatus:           "status",
	ReasonInterim:          "interim",
}

// String gives the reason as a metric label.
func (r Reason) String() string {
	if r < reasonCount {
		return reasonText[r]
	}
	return "unknown"
}

// A ProtocolError is a message that may not be forwarded. The connection it
// came on must be closed: where the next message would begin is unknown.
type ProtocolError struct {
	// Status is what to answer the client: 400, 408, 413, 414, 417, 431, 501
	// or 505 for a request, 502 for a response.
	Status int
	// Reason is from the closed set.
	Reason Reason
	// Detail is one sentence of constant text: what was wrong and what would
	// be right. It never holds bytes of the message.
	Detail string
}

func (e *ProtocolError) Error() string {
	return fmt.Sprintf("%s (%d %s)", e.Detail, e.Status, http.StatusText(e.Status))
}

// refuse makes the error for a request that is wrong in form.
func refuse(reason Reason, detail string) *ProtocolError {
	return &ProtocolError{Status: http.StatusBadRequest, Reason: reason, Detail: detail}
}

// refuseAs is refuse with a status other than 400.
func refuseAs(status int, reason Reason, detail string) *ProtocolError {
	return &ProtocolError{Status: status, Reason: reason, Detail: detail}
}

// Side names an end of an exchange.
type Side uint8

// The two sides. The client is whoever sent the request.
const (
	Client Side = iota + 1
	Upstream
)

// String gives the side as a metric label.
func (s Side) String() string {
	switch s {
	case Client:
		return "client"
	case Upstream:
		return "upstream"
	}
	return "none"
}

// A SideError says at which end an exchange failed, so that a client that
// misbehaves is never counted as a failure of the upstream.
type SideError struct {
	Side Side
	// Op is "read" or "write".
	Op  string
	Err error
}

func (e *SideError) Error() string { return e.Op + " " + e.Side.String() + ": " + e.Err.Error() }

func (e *SideError) Unwrap() error { return e.Err }

// FailedSide tells at which end err happened; zero when it does not say.
func FailedSide(err error) Side {
	var se *SideError
	if errors.As(err, &se) {
		return se.Side
	}
	return 0
}

// StatusOf gives the status with which to answer the client when err ended an
// exchange before any byte of a response was written; 0 means: answer
// nothing, close.
func StatusOf(err error) int {
	if err == nil {
		return 0
	}
	side := FailedSide(err)
	var pe *ProtocolError
	if errors.As(err, &pe) {
		if side == Upstream {
			return http.StatusBadGateway
		}
		return pe.Status
	}
	timeout := errors.Is(err, os.ErrDeadlineExceeded) || errors.Is(err, ErrIdleTimeout) || errors.Is(err, ErrHeadTimeout)
	switch {
	case side == Upstream && timeout:
		return http.StatusGatewayTimeout
	case side == Upstream:
		return http.StatusBadGateway
	case errors.Is(err, ErrSlowBody), errors.Is(err, ErrHeadTimeout):
		return http.StatusRequestTimeout
	case side == Client && timeout:
		return http.StatusRequestTimeout
	}
	return 0
}

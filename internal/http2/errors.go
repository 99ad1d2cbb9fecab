package http2

import (
	"errors"
	"fmt"
)

// ErrRefused is returned by a Lane whose peer has acted on nothing of the call:
// it may be made again, whatever its method.
var ErrRefused = errors.New("stream refused by the peer")

// ErrCancelled is returned by a Lane whose call the peer has broken off.
var ErrCancelled = errors.New("stream broken off by the peer")

// ErrFull is returned by Open when no further stream fits.
var ErrFull = errors.New("as many streams as the peer takes")

// ErrClosing is returned by Open on a connection that takes no new streams, and
// by the lanes of one that was closed at this end.
var ErrClosing = errors.New("connection is closing")

// ErrNoWebSocket is returned when a request is for a WebSocket and the server
// does not take them over HTTP/2 (RFC 8441).
var ErrNoWebSocket = errors.New("the server takes no WebSocket over HTTP/2")

// ErrSilent is the end of a connection whose peer has said nothing for too long.
var ErrSilent = errors.New("peer is silent")

// A Code says on the wire why a stream or a connection ends (RFC 9113 section 7).
type Code uint32

// The codes.
const (
	NoError Code = iota
	Protocol
	Internal
	FlowControl
	SettingsTimeout
	StreamClosed
	FrameSize
	RefusedStream
	Cancel
	Compression
	ConnectError
	EnhanceYourCalm
	InadequateSecurity
	HTTP11Required
)

// Reason says what a peer did that the protocol forbids, or that is too much.
// The set is closed: its text is a metric label.
type Reason string

// The reasons.
const (
	BadPreface  Reason = "preface"  // no preface, or no SETTINGS behind it
	BadKind     Reason = "kind"     // a frame that this end does not take, or not here
	BadLength   Reason = "length"   // payload of the wrong size
	BadPadding  Reason = "padding"  // more padding than payload
	BadStream   Reason = "stream"   // frame on the wrong stream, or out of order
	BadSetting  Reason = "setting"  // a value that the setting cannot have
	BadWindow   Reason = "window"   // grant of nothing, or of too much
	BadBlock    Reason = "hpack"    // a field section that does not decode
	Overrun     Reason = "overrun"  // more data than the window
	AfterEnd    Reason = "end"      // a frame behind the end of a stream
	Malformed   Reason = "fields"   // fields that HTTP/2 forbids
	BadSize     Reason = "size"     // data that content-length does not announce
	Flood       Reason = "flood"    // resets, pings, settings or empty frames without end
	TooLarge    Reason = "section"  // a field section without end
	Unread      Reason = "unread"   // answers that the peer does not read
	SlowSection Reason = "slow"     // a field section, or another frame, that does not come to its end
	TooMany     Reason = "too_many" // more streams than it may open
	Hoarded     Reason = "hoarded"  // data that nobody reads, beyond what there is memory for
)

// A Violation ends the connection it happened on.
type Violation struct {
	Code   Code
	Reason Reason
}

func (v *Violation) Error() string {
	return fmt.Sprintf("peer broke the protocol: %s (code %d)", v.Reason, v.Code)
}

func violated(c Code, r Reason) error { return &Violation{c, r} }

// A ResetError is the end of a call by a code other than those that have an
// error of their own.
type ResetError struct{ Code Code }

func (e *ResetError) Error() string { return fmt.Sprintf("stream reset by the peer (code %d)", e.Code) }

// resetError is what a lane learns of a reset by the peer.
func resetError(c Code) error {
	switch c {
	case RefusedStream:
		return ErrRefused
	case Cancel, NoError:
		return ErrCancelled
	}
	return &ResetError{c}
}

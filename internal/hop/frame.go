package hop

import (
	"encoding/binary"
)

// A frame is a header of 8 bytes (24 bits length of the payload, 8 bits kind
// and flags, 32 bits stream, all big endian) and the payload.
const (
	headerSize = 8
	maxPayload = 64 << 10
	// maxStream is the highest number of a stream; they start at 1.
	maxStream = 1<<31 - 1
	// baseWindow is what a sender may send on a new stream before it hears of
	// more.
	baseWindow = 32 << 10
	// maxCredit bounds the sum of what a peer grants and has not got.
	maxCredit = 1<<31 - 1
	// firstStreams is how many streams may be opened before the peer's hello.
	firstStreams = 128
)

// kind is what a frame is.
type kind uint8

const (
	kindHello  kind = iota + 1 // first frame of the end that accepts: how many streams it takes
	kindData                   // bytes of a stream
	kindWindow                 // more may be sent on a stream
	kindReset                  // a stream is over, both ways
	kindPing                   // to be answered by a pong with the same payload
	kindPong
	kindGoaway // no new streams
	kindCount
)

// The flags, on data only.
const (
	flagOpen  = 0x40 // the first frame of a stream
	flagEnd   = 0x80 // the last frame of a stream in this direction
	flagsMask = 0xc0
)

// Codes of a reset.
const (
	resetCancel  = 1 // the answer is not wanted, or not whole
	resetRefused = 2 // nothing was acted on since the last answer
)

// Codes of a goaway.
const (
	goDrain     = 1
	goViolation = 2
)

// payloadSize is the exact size of the payload of a kind; data has any.
var payloadSize = [kindCount]int{kindHello: 4, kindWindow: 4, kindReset: 4, kindPing: 8, kindPong: 8, kindGoaway: 4}

// Reason says what a peer did that the protocol forbids. The set is closed.
type Reason string

// The reasons.
const (
	BadKind    Reason = "kind"     // unknown kind, or one that this end does not take
	BadFlags   Reason = "flags"    // flags on what is not data
	BadLength  Reason = "length"   // payload of the wrong size
	BadStream  Reason = "stream"   // frame on the wrong stream, or out of order
	BadHello   Reason = "hello"    // hello missing, twice or absurd
	BadWindow  Reason = "window"   // grant of nothing, or of too much
	BadCode    Reason = "code"     // unknown code
	Overrun    Reason = "overrun"  // more data than the window
	AfterEnd   Reason = "end"      // data behind the end of a stream
	Flood      Reason = "flood"    // resets, pings or empty frames without end
	Unread     Reason = "unread"   // answers that the peer does not read
	Unexpected Reason = "answered" // pong to no ping
)

// A Violation ends the connection it happened on.
type Violation struct{ Reason Reason }

func (v *Violation) Error() string { return "peer broke the protocol: " + string(v.Reason) }

func violated(r Reason) error { return &Violation{r} }

type header struct {
	length int
	kind   kind
	flags  uint8
	stream uint32
}

// parseHeader reads a header and checks what can be told from it alone.
func parseHeader(b []byte) (header, error) {
	x := binary.BigEndian.Uint32(b)
	h := header{length: int(x >> 8), kind: kind(x & 0x3f), flags: uint8(x & flagsMask), stream: binary.BigEndian.Uint32(b[4:])}
	switch {
	case h.kind == 0 || h.kind >= kindCount:
		return h, violated(BadKind)
	case h.flags != 0 && h.kind != kindData:
		return h, violated(BadFlags)
	case h.kind == kindData && h.length > maxPayload, h.kind != kindData && h.length != payloadSize[h.kind]:
		return h, violated(BadLength)
	case h.stream > maxStream, (h.stream == 0) != h.kind.whole():
		return h, violated(BadStream)
	}
	return h, nil
}

// whole says whether frames of this kind are about the whole connection.
func (k kind) whole() bool {
	switch k {
	case kindHello, kindPing, kindPong, kindGoaway:
		return true
	}
	return false
}

func appendHeader(b []byte, length int, k kind, flags uint8, stream uint32) []byte {
	b = binary.BigEndian.AppendUint32(b, uint32(length)<<8|uint32(flags)|uint32(k))
	return binary.BigEndian.AppendUint32(b, stream)
}

// A note is a frame other than data.
type note struct {
	kind   kind
	stream uint32
	value  uint64
}

func resetFrame(stream uint32, code uint32) note { return note{kindReset, stream, uint64(code)} }
func windowFrame(stream uint32, n int) note      { return note{kindWindow, stream, uint64(n)} }
func goawayFrame(code uint32) note               { return note{kindGoaway, 0, uint64(code)} }
func pingFrame() note                            { return note{kindPing, 0, pingWord} }

// pingWord is what our pings hold.
const pingWord = 0x73616c6c79706f72

func (n note) append(b []byte) []byte {
	size := payloadSize[n.kind]
	b = appendHeader(b, size, n.kind, 0, n.stream)
	if size == 8 {
		return binary.BigEndian.AppendUint64(b, n.value)
	}
	return binary.BigEndian.AppendUint32(b, uint32(n.value))
}

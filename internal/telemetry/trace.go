package telemetry

import (
	"encoding/binary"
	"encoding/hex"
	"math/rand/v2"
)

// A Trace is a W3C trace context: the trace, the span that speaks, and whether
// the trace is sampled. The zero Trace is none.
type Trace struct {
	ID      [16]byte
	Span    [8]byte
	Sampled bool
}

// traceparentLen is the length of a traceparent header of version 00.
const traceparentLen = 2 + 1 + 32 + 1 + 16 + 1 + 2

// ParseTraceparent reads a traceparent header as strictly as W3C Trace Context
// section 3.2 puts it: exact length, lower-case hex, no ID of zeros. A higher
// version is read as version 00, more fields may follow a dash; version ff is
// none. When ok is false, start a new trace: a damaged one is not repaired.
func ParseTraceparent(b []byte) (t Trace, ok bool) {
	if len(b) < traceparentLen || b[2] != '-' || b[35] != '-' || b[52] != '-' {
		return Trace{}, false
	}
	var version, flags [1]byte
	if !lowerHex(version[:], b[:2]) || version[0] == 0xff {
		return Trace{}, false
	}
	if len(b) > traceparentLen && (version[0] == 0 || b[traceparentLen] != '-') {
		return Trace{}, false
	}
	if !lowerHex(t.ID[:], b[3:35]) || !lowerHex(t.Span[:], b[36:52]) || !lowerHex(flags[:], b[53:55]) {
		return Trace{}, false
	}
	t.Sampled = flags[0]&1 != 0
	if t.ID == [16]byte{} || t.Span == [8]byte{} {
		return Trace{}, false
	}
	return t, true
}

// lowerHex decodes src, which has twice the length of dst.
func lowerHex(dst, src []byte) bool {
	bad := byte(0)
	for i := range dst {
		hi, lo := nibbles[src[2*i]], nibbles[src[2*i+1]]
		bad |= hi | lo
		dst[i] = hi<<4 | lo
	}
	return bad <= 15
}

// nibbles are the values of lower-case hexadecimal digits, 0xff for all others.
var nibbles = func() (t [256]byte) {
	for i := range t {
		t[i] = 0xff
	}
	for i, c := range []byte("0123456789abcdef") {
		t[c] = byte(i)
	}
	return t
}()

// NewTrace starts a trace. The IDs are random but no secret.
func NewTrace() Trace {
	t := Trace{Span: newSpan()}
	for t.ID == [16]byte{} {
		binary.BigEndian.PutUint64(t.ID[:8], rand.Uint64())
		binary.BigEndian.PutUint64(t.ID[8:], rand.Uint64())
	}
	return t
}

func newSpan() (s [8]byte) {
	for s == [8]byte{} {
		binary.BigEndian.PutUint64(s[:], rand.Uint64())
	}
	return s
}

// Child returns a new span of the same trace; of no trace, a new trace.
func (t Trace) Child() Trace {
	if t.ID == [16]byte{} {
		return NewTrace()
	}
	t.Span = newSpan()
	return t
}

// AppendTraceparent appends the header value in version 00 to dst.
func (t Trace) AppendTraceparent(dst []byte) []byte {
	dst = append(dst, "00-"...)
	dst = t.AppendID(dst)
	dst = append(dst, '-')
	dst = appendHex(dst, t.Span[:])
	if t.Sampled {
		return append(dst, "-01"...)
	}
	return append(dst, "-00"...)
}

// AppendID appends the ID of the trace in hex to dst.
func (t Trace) AppendID(dst []byte) []byte { return appendHex(dst, t.ID[:]) }

// appendHex appends src in hex, four bytes at a time: each call says some IDs.
func appendHex(dst, src []byte) []byte {
	const ones = 0x0101010101010101
	for ; len(src) >= 4; src = src[4:] {
		x := uint64(binary.BigEndian.Uint32(src))
		x = (x<<16 | x) & 0x0000ffff0000ffff
		x = (x<<8 | x) & 0x00ff00ff00ff00ff
		x = (x<<4 | x) & 0x0f0f0f0f0f0f0f0f // a digit in each byte
		letters := (x + 6*ones) >> 4 & ones
		dst = binary.BigEndian.AppendUint64(dst, x+'0'*ones+('a'-10-'0')*letters)
	}
	return dst
}

// String returns the ID of the trace in hex, the form that logs and audit use;
// "" for no trace.
func (t Trace) String() string {
	if t.ID == [16]byte{} {
		return ""
	}
	return hex.EncodeToString(t.ID[:])
}

package telemetry

import "encoding/hex"

// B3 is how Zipkin's libraries name a trace: in one field, or in several.
type B3 struct {
	// Trace is what they name; the zero Trace when they say only whether to keep
	// one that is to be begun.
	Trace Trace
	// Decided says that Trace.Sampled is somebody's word.
	Decided bool
}

// ParseB3 reads the value of the field b3: TRACE-SPAN, TRACE-SPAN-STATE or
// TRACE-SPAN-STATE-PARENT, or STATE alone.
func ParseB3(b []byte) (B3, bool) {
	if len(b) == 1 {
		return b3State(B3{}, b)
	}
	id := 32
	if len(b) > 16 && b[16] == '-' {
		id = 16
	}
	if len(b) < id+1+16 || b[id] != '-' {
		return B3{}, false
	}
	x, ok := b3IDs(b[:id], b[id+1:id+17])
	rest := b[id+17:]
	if !ok || len(rest) == 0 {
		return x, ok
	}
	if rest[0] != '-' || len(rest) != 2 && (len(rest) != 2+1+16 || rest[2] != '-') {
		return B3{}, false
	}
	return b3State(x, rest[1:2])
}

// ParseB3Fields reads the values of X-B3-TraceId, X-B3-SpanId, X-B3-Sampled and
// X-B3-Flags, nil for those that are not there.
func ParseB3Fields(trace, span, sampled, flags []byte) (x B3, ok bool) {
	if trace != nil || span != nil {
		if x, ok = b3IDs(trace, span); !ok {
			return B3{}, false
		}
	}
	switch {
	case string(flags) == "1":
		return b3State(x, []byte{'d'})
	case string(sampled) == "true": // as old libraries write it
		return b3State(x, []byte{'1'})
	case string(sampled) == "false":
		return b3State(x, []byte{'0'})
	case sampled != nil:
		return b3State(x, sampled)
	}
	return x, ok
}

// b3IDs reads the IDs; that of a trace may have half of the digits.
func b3IDs(trace, span []byte) (x B3, ok bool) {
	at := 16 - len(trace)/2
	if len(trace) != 32 && len(trace) != 16 || len(span) != 16 {
		return B3{}, false
	}
	if !lowerHex(x.Trace.ID[at:], trace) || !lowerHex(x.Trace.Span[:], span) || x.Trace.ID == [16]byte{} || x.Trace.Span == [8]byte{} {
		return B3{}, false
	}
	return x, true
}

func b3State(x B3, state []byte) (B3, bool) {
	switch string(state) {
	case "1", "d":
		x.Trace.Sampled = true
	case "0":
	default:
		return B3{}, false
	}
	x.Decided = true
	return x, true
}

// AppendB3 appends the value of the field b3 to dst.
func (t Trace) AppendB3(dst []byte) []byte {
	dst = hex.AppendEncode(dst, t.ID[:])
	dst = append(dst, '-')
	dst = hex.AppendEncode(dst, t.Span[:])
	return append(dst, '-', t.b3Sampled())
}

// AppendB3Fields appends the field lines of the form with several to dst.
func (t Trace) AppendB3Fields(dst []byte) []byte {
	dst = hex.AppendEncode(append(dst, "X-B3-TraceId: "...), t.ID[:])
	dst = hex.AppendEncode(append(dst, "\r\nX-B3-SpanId: "...), t.Span[:])
	return append(append(dst, "\r\nX-B3-Sampled: "...), t.b3Sampled(), '\r', '\n')
}

func (t Trace) b3Sampled() byte {
	if t.Sampled {
		return '1'
	}
	return '0'
}

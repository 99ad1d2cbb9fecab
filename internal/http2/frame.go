package http2

import "encoding/binary"

// A frame is a header of 9 bytes (24 bits length of the payload, 8 bits kind,
// 8 bits flags, 32 bits stream, all big endian) and the payload (RFC 9113
// section 4.1).
const (
	headerSize = 9
	// maxPayload is what neither end may exceed before it is told otherwise,
	// and we tell nobody.
	maxPayload = 16 << 10
	// maxStream is the highest number of a stream.
	maxStream = 1<<31 - 1
	// firstWindow is every window before anything was said of it.
	firstWindow = 65535
	maxWindow   = 1<<31 - 1
)

// Preface is what a client says first (RFC 9113 section 3.4).
const Preface = "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"

// kind is what a frame is.
type kind uint8

const (
	kindData kind = iota
	kindHeaders
	kindPriority
	kindReset
	kindSettings
	kindPush
	kindPing
	kindGoaway
	kindWindow
	kindContinuation
)

// The flags.
const (
	flagEnd        = 0x01 // the last frame of a stream in this direction
	flagAck        = 0x01
	flagEndHeaders = 0x04
	flagPadded     = 0x08
	flagPriority   = 0x20
)

// The settings.
const (
	settingTable    = 1 // size of the table of HPACK
	settingPush     = 2
	settingStreams  = 3 // how many streams may be open at once
	settingWindow   = 4 // of each stream, at first
	settingFrame    = 5 // largest payload
	settingList     = 6 // size of a decoded field section
	settingExtended = 8 // extended CONNECT (RFC 8441)
)

type header struct {
	length int
	kind   kind
	flags  uint8
	stream uint32
}

func parseHeader(b []byte) header {
	x := binary.BigEndian.Uint32(b)
	return header{length: int(x >> 8), kind: kind(x), flags: b[4], stream: binary.BigEndian.Uint32(b[5:]) & maxStream}
}

// check looks at what can be told from the header alone.
func (h header) check() error {
	if h.length > maxPayload {
		return violated(FrameSize, BadLength)
	}
	switch h.kind {
	case kindData, kindHeaders, kindPriority, kindReset, kindPush, kindContinuation:
		if h.stream == 0 {
			return violated(Protocol, BadStream)
		}
	case kindSettings, kindPing, kindGoaway:
		if h.stream != 0 {
			return violated(Protocol, BadStream)
		}
	}
	ok := true
	switch h.kind {
	case kindPriority:
		ok = h.length == 5
	case kindReset, kindWindow:
		ok = h.length == 4
	case kindPing:
		ok = h.length == 8
	case kindGoaway:
		ok = h.length >= 8
	case kindSettings:
		ok = h.length%6 == 0 && (h.flags&flagAck == 0 || h.length == 0)
	}
	if !ok {
		return violated(FrameSize, BadLength)
	}
	return nil
}

// unpad takes the padding off a payload.
func (h header) unpad(p []byte) ([]byte, error) {
	if h.flags&flagPadded == 0 {
		return p, nil
	}
	if len(p) == 0 {
		return nil, violated(FrameSize, BadLength)
	}
	n := int(p[0])
	if n >= len(p) {
		return nil, violated(Protocol, BadPadding)
	}
	return p[1 : len(p)-n], nil
}

func appendHeader(b []byte, length int, k kind, flags uint8, stream uint32) []byte {
	b = binary.BigEndian.AppendUint32(b, uint32(length)<<8|uint32(k))
	b = append(b, flags)
	return binary.BigEndian.AppendUint32(b, stream)
}

func appendReset(b []byte, stream uint32, code Code) []byte {
	b = appendHeader(b, 4, kindReset, 0, stream)
	return binary.BigEndian.AppendUint32(b, uint32(code))
}

func appendWindow(b []byte, stream uint32, n int) []byte {
	b = appendHeader(b, 4, kindWindow, 0, stream)
	return binary.BigEndian.AppendUint32(b, uint32(n))
}

func appendPing(b []byte, flags uint8, word uint64) []byte {
	b = appendHeader(b, 8, kindPing, flags, 0)
	return binary.BigEndian.AppendUint64(b, word)
}

func appendGoaway(b []byte, last uint32, code Code) []byte {
	b = appendHeader(b, 8, kindGoaway, 0, 0)
	b = binary.BigEndian.AppendUint32(b, last)
	return binary.BigEndian.AppendUint32(b, uint32(code))
}

// A setting is one parameter of a SETTINGS frame.
type setting struct {
	id    uint16
	value uint32
}

func appendSettings(b []byte, list ...setting) []byte {
	b = appendHeader(b, 6*len(list), kindSettings, 0, 0)
	for _, s := range list {
		b = binary.BigEndian.AppendUint16(b, s.id)
		b = binary.BigEndian.AppendUint32(b, s.value)
	}
	return b
}

func appendSettingsAck(b []byte) []byte { return appendHeader(b, 0, kindSettings, flagAck, 0) }

// appendHeaders appends a field section, in as many frames as it takes.
func appendHeaders(b []byte, stream uint32, end bool, block []byte) []byte {
	flags, k := uint8(0), kindHeaders
	if end {
		flags = flagEnd
	}
	for len(block) > maxPayload {
		b = append(appendHeader(b, maxPayload, k, flags, stream), block[:maxPayload]...)
		block, flags, k = block[maxPayload:], 0, kindContinuation
	}
	return append(appendHeader(b, len(block), k, flags|flagEndHeaders, stream), block...)
}

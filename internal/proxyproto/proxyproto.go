// Package proxyproto reads and writes the binary header of the PROXY protocol,
// version 2 (HAProxy's proxy-protocol.txt, section 2.2): who the peer of a
// connection was before proxies stood between.
//
// It takes version 2 only: the text form of version 1 cannot be told from the
// bytes of a peer that was not meant to send one.
package proxyproto

import (
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"net/netip"
)

const (
	signature = "\r\n\r\n\x00\r\nQUIT\n"
	headSize  = len(signature) + 4
	// maxSize bounds what follows the head. The specification has senders keep
	// to 536 bytes in all, unless they know better.
	maxSize = 2048

	local, proxied = 0x20, 0x21
	unspec         = 0x00
	tcp4, tcp6     = 0x11, 0x21

	typeCRC    = 0x03
	typeSPIFFE = 0xe0 // the first of those for custom use
)

// A Header says who speaks. Src and Dst are not valid when the sender did not
// say, as in a health check of its own.
type Header struct {
	Src, Dst netip.AddrPort
	// SPIFFE is the verified SPIFFE ID of the caller, in a field of type 0xE0;
	// empty when there is none.
	SPIFFE string
}

// ErrNone is returned for a connection that begins with anything else.
var ErrNone = errors.New("no PROXY protocol v2 header")

// Append writes the header to b.
func (h Header) Append(b []byte) []byte {
	src, dst := h.Src.Addr().Unmap(), h.Dst.Addr().Unmap()
	start := len(b)
	b = append(b, signature...)
	switch {
	case !h.Src.IsValid() || !h.Dst.IsValid():
		b = append(b, proxied, unspec, 0, 0)
	case src.Is4() && dst.Is4():
		b = append(b, proxied, tcp4, 0, 0)
		b = append(append(b, src.AsSlice()...), dst.AsSlice()...)
	default:
		b = append(b, proxied, tcp6, 0, 0)
		s, d := src.As16(), dst.As16()
		b = append(append(b, s[:]...), d[:]...)
	}
	if b[start+headSize-3] != unspec {
		b = binary.BigEndian.AppendUint16(b, h.Src.Port())
		b = binary.BigEndian.AppendUint16(b, h.Dst.Port())
	}
	if h.SPIFFE != "" {
		b = append(b, typeSPIFFE)
		b = binary.BigEndian.AppendUint16(b, uint16(len(h.SPIFFE))) //nolint:gosec // at most 2,048 bytes (SPIFFE-ID section 2.3)
		b = append(b, h.SPIFFE...)
	}
	binary.BigEndian.PutUint16(b[start+headSize-2:], uint16(len(b)-start-headSize)) //nolint:gosec // as above
	return b
}

// Read takes the header off the front of a connection, and no byte more.
func Read(r io.Reader) (h Header, err error) {
	var buf [headSize + maxSize]byte
	if _, err := io.ReadFull(r, buf[:headSize]); err != nil {
		return h, err
	}
	if string(buf[:len(signature)]) != signature {
		return h, ErrNone
	}
	kind, family := buf[len(signature)], buf[len(signature)+1]
	size := int(binary.BigEndian.Uint16(buf[headSize-2:]))
	if kind != local && kind != proxied {
		return h, fmt.Errorf("PROXY protocol: version and command %#02x, want 0x20 or 0x21", kind)
	}
	if size > maxSize {
		return h, fmt.Errorf("PROXY protocol: a header of %d bytes, the limit is %d", size, maxSize)
	}
	body := buf[headSize : headSize+size]
	if _, err := io.ReadFull(r, body); err != nil {
		return h, fmt.Errorf("PROXY protocol: %w", noEOF(err))
	}
	rest, err := h.addresses(family, body)
	if err == nil {
		err = h.fields(buf[:headSize+size], headSize+size-len(rest))
	}
	if err != nil {
		return Header{}, fmt.Errorf("PROXY protocol: %w", err)
	}
	if kind == local {
		return Header{}, nil // about the sender itself: its addresses mean nothing
	}
	return h, nil
}

func noEOF(err error) error {
	if err == io.EOF {
		return io.ErrUnexpectedEOF
	}
	return err
}

// addresses reads both ends and returns what follows them.
func (h *Header) addresses(family byte, b []byte) ([]byte, error) {
	n := 0
	switch family {
	case tcp4:
		n = 4
	case tcp6:
		n = 16
	case unspec:
		return b, nil
	default:
		return nil, fmt.Errorf("family and transport %#02x: only TCP over IPv4 and IPv6 is taken", family)
	}
	if len(b) < 2*n+4 {
		return nil, fmt.Errorf("%d bytes of addresses, want %d", len(b), 2*n+4)
	}
	src, _ := netip.AddrFromSlice(b[:n])
	dst, _ := netip.AddrFromSlice(b[n : 2*n])
	h.Src = netip.AddrPortFrom(src.Unmap(), binary.BigEndian.Uint16(b[2*n:]))
	h.Dst = netip.AddrPortFrom(dst.Unmap(), binary.BigEndian.Uint16(b[2*n+2:]))
	return b[2*n+4:], nil
}

// fields reads the typed fields of a whole header from an offset on.
func (h *Header) fields(whole []byte, at int) error {
	for at < len(whole) {
		if len(whole)-at < 3 {
			return errors.New("half a field at the end")
		}
		kind, n := whole[at], int(binary.BigEndian.Uint16(whole[at+1:]))
		if at += 3; n > len(whole)-at {
			return fmt.Errorf("field %#02x of %d bytes, %d are left", kind, n, len(whole)-at)
		}
		switch kind {
		case typeSPIFFE:
			h.SPIFFE = string(whole[at : at+n])
		case typeCRC:
			if n != 4 {
				return fmt.Errorf("checksum of %d bytes, want 4", n)
			}
			want := binary.BigEndian.Uint32(whole[at:])
			binary.BigEndian.PutUint32(whole[at:], 0) // as it was computed
			if crc32.Checksum(whole, crc32.MakeTable(crc32.Castagnoli)) != want {
				return errors.New("the checksum is wrong")
			}
		}
		at += n
	}
	return nil
}

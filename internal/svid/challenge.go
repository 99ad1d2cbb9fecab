package svid

import (
	"crypto/rand"
	"net"
	"sync"
	"time"
)

// A challenge closes a gap that credentials and inspection leave open. A
// program could connect, write its request ahead, give a copy of the
// connection away, and become the rightful program before it is inspected: the
// request then bears the right pid. So a random HTTP/2 PING is sent after the
// inspection, and nothing is answered until its acknowledgement has come from
// the pid that opened the connection (RFC 9113 section 6.7). Each Read beneath
// delivers bytes of that pid only.

const (
	prefaceLen    = 24 // the client's, RFC 9113 section 3.4
	frameHeader   = 9
	pingType      = 6
	pingLen       = 8
	ackFlag       = 1
	challengeTime = 5 * time.Second
)

// A challenged connection sends the PING behind the server's first whole
// frames, and watches for the acknowledgement.
type challenged struct {
	net.Conn
	secret [pingLen]byte
	proven chan struct{} // closed by the right acknowledgement

	wmu  sync.Mutex // guards the next two
	sent bool
	out  frames

	in      frames // belongs to the one reader
	waiting bool   // likewise: the acknowledgement is yet to come
}

func challenge(c net.Conn) *challenged {
	h := &challenged{Conn: c, proven: make(chan struct{}), waiting: true}
	rand.Read(h.secret[:]) // never fails
	h.in.skip = prefaceLen
	return h
}

// Write passes b on, with the PING behind it once b ends a frame.
func (h *challenged) Write(b []byte) (int, error) {
	h.wmu.Lock()
	defer h.wmu.Unlock()
	if h.sent {
		return h.Conn.Write(b)
	}
	h.out.walk(b, nil)
	if !h.out.whole() {
		return h.Conn.Write(b)
	}
	h.sent = true
	ping := append([]byte{0, 0, pingLen, pingType, 0, 0, 0, 0, 0}, h.secret[:]...)
	n, err := h.Conn.Write(append(append(make([]byte, 0, len(b)+len(ping)), b...), ping...))
	return min(n, len(b)), err
}

func (h *challenged) Read(b []byte) (int, error) {
	n, err := h.Conn.Read(b)
	if h.waiting && n > 0 {
		h.in.walk(b[:n], func(data [pingLen]byte) {
			if h.waiting && data == h.secret {
				h.waiting = false
				close(h.proven)
			}
		})
	}
	return n, err
}

// frames follows HTTP/2 frames through a stream that is cut anywhere.
type frames struct {
	skip int // bytes of the current payload, or of the preface, still to come
	head []byte
	seen bool // at least one whole frame
}

// whole reports whether the stream stands between two frames.
func (f *frames) whole() bool { return f.seen && f.skip == 0 && len(f.head) == 0 }

// walk takes the next bytes. acked gets the data of each PING that is an
// acknowledgement.
func (f *frames) walk(b []byte, acked func([pingLen]byte)) {
	for len(b) > 0 {
		if f.skip > 0 {
			n := min(f.skip, len(b))
			f.skip -= n
			b = b[n:]
			continue
		}
		want := frameHeader
		if f.isAck() {
			want += pingLen
		}
		n := min(want-len(f.head), len(b))
		f.head = append(f.head, b[:n]...)
		b = b[n:]
		switch {
		case len(f.head) == frameHeader && f.isAck(): // its data comes next
		case len(f.head) == frameHeader:
			f.skip = int(f.head[0])<<16 | int(f.head[1])<<8 | int(f.head[2])
			f.head, f.seen = f.head[:0], true
		case len(f.head) == frameHeader+pingLen:
			if acked != nil {
				acked([pingLen]byte(f.head[frameHeader:]))
			}
			f.head, f.seen = f.head[:0], true
		}
	}
}

func (f *frames) isAck() bool {
	h := f.head
	return len(h) >= frameHeader && h[3] == pingType && h[4]&ackFlag != 0 && h[0] == 0 && h[1] == 0 && h[2] == pingLen
}

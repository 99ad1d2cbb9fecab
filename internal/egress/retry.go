package egress

import (
	"bytes"
	"encoding/binary"
	"io"
)

// retryRandom is the random of a ServerHello that is a HelloRetryRequest
// (RFC 8446, 4.1.3).
var retryRandom = []byte{
	0xCF, 0x21, 0xAD, 0x74, 0xE5, 0x9A, 0x61, 0x11, 0xBE, 0x1D, 0x8C, 0x02, 0x1E, 0x65, 0xB8, 0x91,
	0xC2, 0xA2, 0x11, 0x16, 0x7A, 0xBB, 0x8C, 0x5E, 0x07, 0x9E, 0x09, 0xE2, 0xC8, 0xA8, 0x33, 0x9C,
}

// A greeting watches the records of a TLS connection until no further
// ClientHello can come. A server that answers with HelloRetryRequest gets a
// second one, and its name counts as much as that of the first. The caller may
// send it before it was asked for, so its handshake records wait until the
// server has spoken.
type greeting struct {
	check func(*Hello) error // holds a second hello against what was allowed
	shown *shown             // watches for the certificate, where one is asked for

	head    []byte        // what the server has said so far
	decided chan struct{} // closed when the server has said enough
	retry   bool          // written before decided is closed
	over    bool          // decided is closed; belongs to hear
}

func newGreeting(check func(*Hello) error) *greeting {
	return &greeting{check: check, decided: make(chan struct{})}
}

// hear is told what the server sends, before the caller gets it; nil for its
// end.
func (g *greeting) hear(b []byte) error {
	g.decide(b)
	return g.shown.hear(b)
}

// decide finds out whether the server asks for a second hello.
func (g *greeting) decide(b []byte) {
	if g.over {
		return
	}
	const whole = 5 + 4 + 2 + 32 // record and message headers, version, random
	if b != nil {
		g.head = append(g.head, b[:min(len(b), whole-len(g.head))]...)
		if g.head[0] == recordHandshake && len(g.head) < whole {
			return
		}
	}
	g.over = true
	if len(g.head) == whole {
		split := binary.BigEndian.Uint16(g.head[3:]) < whole-5 // the message goes on in another record
		g.retry = split || g.head[5] == helloServer && bytes.Equal(g.head[11:], retryRandom)
	}
	g.head = nil
	close(g.decided)
}

// pass moves records from src to dst until no further ClientHello can come; the
// error is a *Refusal when one came that may not, and io.EOF at the end of src.
func (g *greeting) pass(dst io.Writer, src io.Reader) error {
	head := make([]byte, 5)
	for {
		n, err := io.ReadFull(src, head)
		if err != nil {
			_, _ = dst.Write(head[:n])
			return err
		}
		switch handshake := head[0] == recordHandshake; {
		case g.free(handshake):
			_, err = dst.Write(head)
			return err
		case handshake:
			return g.second(dst, src, head)
		}
		if _, err := dst.Write(head); err != nil {
			return err
		}
		if _, err := io.CopyN(dst, src, int64(binary.BigEndian.Uint16(head[3:]))); err != nil {
			return err
		}
	}
}

// free reports whether the server has answered without asking for a second
// hello. With wait it waits for the answer.
func (g *greeting) free(wait bool) bool {
	if wait {
		<-g.decided
	}
	select {
	case <-g.decided:
		return !g.retry
	default:
		return false
	}
}

// second passes on one handshake message whose record begins with head. If it
// is a ClientHello it must pass check.
func (g *greeting) second(dst io.Writer, src io.Reader, head []byte) error {
	if binary.BigEndian.Uint16(head[3:]) == 0 {
		return refuse(ReasonHello, "a handshake record is empty")
	}
	raw := append(head, 0)
	if _, err := io.ReadFull(src, raw[5:]); err != nil {
		return err
	}
	if raw[5] == helloClient {
		h, err := continueHello(src, raw)
		if err == nil {
			err = g.check(&h)
		}
		if err != nil {
			return err
		}
		raw = h.Raw
	}
	_, err := dst.Write(raw)
	return err
}

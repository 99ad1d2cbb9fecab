package http2

import (
	"io"
	"net"
	"strings"
	"testing"
	"testing/synctest"

	"sallyport/internal/socket"
)

// A connection on which nothing moves holds no buffer of the burst before.
func TestRestHoldsNoBuffer(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		near, far := net.Pipe()
		c := Accepted(near, Config{}, func(l *Lane) bool {
			go func() {
				defer l.Close()
				_, _ = l.Read(make([]byte, 4096))
				_, _ = io.WriteString(l, "HTTP/1.1 200 OK\r\nContent-Length: 100000\r\n\r\n"+strings.Repeat("x", 100000))
				_, _ = l.Read(make([]byte, 4096)) // until the next call, or the end
			}()
			return true
		})
		ended := make(chan struct{})
		go func() {
			defer close(ended)
			_ = c.Run()
		}()
		p := speak(t, func() net.Conn { return far })
		go func() { _, _ = io.Copy(io.Discard, far) }()
		p.head(1, true, request("GET")...)
		synctest.Wait()
		c.mu.Lock()
		if n := cap(c.out.pend) + cap(c.out.spare); n > 2*restBuffer {
			t.Errorf("%d bytes are held", n)
		}
		c.mu.Unlock()
		far.Close()
		<-ended
	})
}

// A lateConn reads late, and sees that no buffer is held while it waits.
type lateConn struct {
	net.Conn
	t     *testing.T
	waits int
}

func (c *lateConn) ReadLate(from socket.Lender) (int, error) {
	if c.waits++; from.(*reader).buf != nil {
		c.t.Error("a buffer is held")
	}
	var first [1]byte
	if _, err := c.Conn.Read(first[:]); err != nil {
		return 0, err
	}
	return copy(from.Lend(), first[:]), nil
}

// While nothing comes there is no buffer to read into.
func TestWaitingHoldsNoBuffer(t *testing.T) {
	near, far := net.Pipe()
	nc := &lateConn{Conn: near, t: t}
	c := Accepted(nc, Config{}, func(l *Lane) bool {
		go func() {
			defer l.Close()
			_, _ = l.Read(make([]byte, 4096))
			_, _ = io.WriteString(l, "HTTP/1.1 204 No Content\r\n\r\n")
		}()
		return true
	})
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		_ = c.Run()
	}()
	served := make(chan string)
	heard := make(chan *peer, 1)
	go func() {
		p := speak(t, func() net.Conn { return far })
		heard <- p
		p.head(1, true, request("GET")...)
	}()
	go func() { served <- (<-heard).outcome(1) }()
	if got := <-served; got != "204" {
		t.Errorf("got %s", got)
	}
	far.Close()
	<-ended
	if nc.waits < 3 { // for the SETTINGS, the call, and the next
		t.Errorf("waited %d times", nc.waits)
	}
}

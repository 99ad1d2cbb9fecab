package http2

import (
	"io"
	"net"
	"strings"
	"testing"
	"testing/synctest"
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

package upstream

import (
	"io"
	"net"
	"testing"
	"time"

	"sallyport/internal/capture"
	"sallyport/internal/http1"
)

// An application that says nothing is given up after its time, whatever the
// connection to it is made of: no wait begins anew behind another.
func TestSilentApplicationHasItsTimeOnce(t *testing.T) {
	const timeout = 4 * time.Second // a stall shorter than that is no second wait
	t.Parallel()
	for name, made := range map[string]func(net.Conn) net.Conn{
		"plain":  func(c net.Conn) net.Conn { return c },
		"direct": capture.NewDirect,
	} {
		t.Run(name, func(t *testing.T) {
			app, client := dialled(t), dialled(t)
			if _, err := io.WriteString(client[0], "GET / HTTP/1.1\r\nHost: a\r\n\r\n"); err != nil {
				t.Fatal(err)
			}
			down, up := http1.NewConn(client[1], http1.Limits{}), http1.NewConn(made(app[0]), http1.Limits{})
			var req http1.Request
			if err := down.ReadRequest(&req); err != nil {
				t.Fatal(err)
			}
			x := http1.Exchange{Down: down, Up: up, Request: &req, Timeout: timeout}
			start := time.Now()
			_, err := x.Run()
			if http1.StatusOf(err) != 504 {
				t.Errorf("it ends with %v", err)
			}
			if d := time.Since(start); d < timeout || d >= 2*timeout {
				t.Errorf("it took %v, want %v and up to an eighth more", d, timeout)
			}
		})
	}
}

// dialled gives both ends of a TCP connection.
func dialled(t *testing.T) (ends [2]net.Conn) {
	t.Helper()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	if ends[0], err = net.Dial("tcp", ln.Addr().String()); err != nil {
		t.Fatal(err)
	}
	if ends[1], err = ln.Accept(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { ends[0].Close(); ends[1].Close() })
	return ends
}

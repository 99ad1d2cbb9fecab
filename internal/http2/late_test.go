package http2

import (
	"bytes"
	"io"
	"net"
	"net/http"
	"testing"
	"testing/synctest"

	xhttp2 "golang.org/x/net/http2"
)

// Uploads that were answered early may have more on its way, however many they
// are: who sends that has done nothing wrong.
func TestLateData(t *testing.T) {
	dial := served(t, Config{}, func(l *Lane) {
		b := make([]byte, 4096)
		if _, err := l.Read(b); err == nil {
			_, _ = io.WriteString(l, "HTTP/1.1 403 Forbidden\r\nContent-Length: 0\r\n\r\n")
		}
	})
	p := speak(t, dial)
	const many = 500
	id := uint32(1)
	for ; id < 2*many; id += 2 {
		p.head(id, false, request("POST")...)
		if got := p.outcome(id); got != "403" {
			t.Fatalf("call %d: %s", id, got)
		}
	}
	for late := uint32(1); late < 2*many; late += 2 {
		_ = p.WriteData(late, true, []byte("abc"))
	}
	p.head(id, true, request("GET")...)
	if got := p.outcome(id); got != "403" {
		t.Errorf("the connection did not survive: %s", got)
	}
	// What has ended has ended.
	_ = p.WriteData(2*many-1, true, []byte("abc"))
	if got := p.outcome(id + 2); got != "goaway 5" {
		t.Errorf("data behind the end: %s", got)
	}
}

// A client that is gone ends its calls as one does that breaks them off.
func TestClientIsGone(t *testing.T) {
	for name, end := range map[string]func(p *peer){
		"closed":   func(p *peer) { p.nc.Close() },
		"mistaken": func(p *peer) { _ = p.WriteWindowUpdate(0, 0) },
		"silent":   func(*peer) {},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				near, far := net.Pipe()
				cut := make(chan struct{})
				c := Accepted(near, Config{}, func(l *Lane) bool {
					l.OnCut(func() {
						l.Close()
						close(cut)
					})
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
				end(p)
				<-cut
				<-ended
				far.Close()
			})
		})
	}
}

// What was sent into a tunnel that is then refused is nobody's request, and the
// lane is not left behind.
func TestRefusedTunnel(t *testing.T) {
	for _, end := range []bool{true, false} {
		read := make(chan []byte, 1)
		dial := served(t, Config{}, func(l *Lane) {
			b := make([]byte, 4096)
			n, _ := l.Read(b)
			if !bytes.HasPrefix(b[:n], []byte("GET / ")) {
				t.Errorf("read %q", b[:n])
			}
			_, _ = io.WriteString(l, "HTTP/1.1 403 Forbidden\r\nContent-Length: 0\r\n\r\n")
			more, err := io.ReadAll(l)
			if err != errSpent {
				t.Errorf("behind it: %v", err)
			}
			read <- more
		})
		p := speak(t, dial)
		p.head(1, end, request("CONNECT", ":protocol", "websocket")...)
		if !end {
			_ = p.WriteData(1, true, []byte("GET /smuggled HTTP/1.1\r\nHost: a\r\n\r\n"))
		}
		if got := p.outcome(1); got != "403" {
			t.Errorf("the call: %s", got)
		}
		if more := <-read; len(more) > 0 {
			t.Errorf("a later reader got %q", more)
		}
		_ = p.WriteGoAway(0, xhttp2.ErrCodeNo, nil)
	}
}

// A peer that allows a smaller table of HPACK may insist on hearing that it is
// used (RFC 7541 section 4.2), before any field and once.
func TestSizeOfTable(t *testing.T) {
	dial := served(t, Config{}, handled(func(http.ResponseWriter, *http.Request) {}))
	p := speak(t, dial)
	_ = p.WriteSettings(xhttp2.Setting{ID: xhttp2.SettingHeaderTableSize, Val: 0})
	for id := uint32(1); id < 6; id += 2 {
		p.head(id, true, request("GET")...)
		for {
			f, err := p.ReadFrame()
			if err != nil {
				t.Fatal(err)
			}
			h, ok := f.(*xhttp2.HeadersFrame)
			if !ok {
				continue
			}
			if b := h.HeaderBlockFragment(); (b[0] == noTable) != (id == 1) {
				t.Errorf("the section of call %d begins with %x", id, b[0])
			}
			break
		}
	}
}

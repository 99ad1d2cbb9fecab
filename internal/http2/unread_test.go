package http2

import (
	"io"
	"net"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	xhttp2 "golang.org/x/net/http2"
)

// A peer that reads no answer gets few of them made, whatever becomes of the
// lanes, and however soon they are free for another call.
func TestPeerThatNeverReads(t *testing.T) {
	x := "\r\nX: " + strings.Repeat("y", 8000) + "\r\n"
	head := "HTTP/1.1 204 No Content" + x + "\r\n"
	body := "HTTP/1.1 200 OK\r\nContent-Length: 1" + x + "\r\ny"
	trailers := "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n0" + x + "\r\n"
	small := "HTTP/1.1 400 Bad Request\r\nContent-Length: 500\r\n\r\n" + strings.Repeat("y", 500)
	bulk := "HTTP/1.1 200 OK\r\nContent-Length: 100000\r\n\r\n" + strings.Repeat("y", 100000)
	for _, tt := range []struct {
		name, answer string
		ends         bool // the lane, with the answer
		broken       bool // is each call, by the peer
		window       uint32
	}{
		{name: "heads on lanes that go on", answer: head},
		{name: "heads on lanes that end", answer: head, ends: true},
		{name: "trailers", answer: trailers, ends: true},
		{name: "small answers on lanes that end", answer: small, ends: true},
		{name: "heads of answers that are broken off", answer: body, broken: true},
		{name: "bodies that are broken off", answer: bulk, broken: true, window: maxWindow},
	} {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				near, far := net.Pipe()
				var wg sync.WaitGroup
				c := Accepted(near, Config{}, func(l *Lane) bool {
					l.OnCut(func() { l.Close() })
					wg.Go(func() {
						defer l.Close()
						b := make([]byte, 4096)
						for {
							if _, err := l.Read(b); err != nil {
								return
							}
							if _, err := io.WriteString(l, tt.answer); err != nil || tt.ends {
								return
							}
						}
					})
					return true
				})
				wg.Go(func() { _ = c.Run() })
				p := speak(t, func() net.Conn { return far })
				if !tt.broken {
					tt.window = maxWindow
					_ = p.WriteWindowUpdate(0, maxWindow-firstWindow)
				}
				_ = p.WriteSettings(xhttp2.Setting{ID: xhttp2.SettingInitialWindowSize, Val: tt.window})
				_ = far.SetDeadline(time.Time{})
				most := 0
				for id := uint32(1); id < 20000; id += 2 {
					if p.head(id, true, request("GET")...); tt.broken {
						synctest.Wait()
						_ = p.WriteRSTStream(id, xhttp2.ErrCodeCancel)
					}
					time.Sleep(time.Millisecond)
					c.mu.Lock()
					most = max(most, len(c.out.pend))
					waiting := len(c.out.line) + len(c.thirsty)
					lanes, ended := len(c.lanes), c.err != nil
					c.mu.Unlock()
					if waiting > lanes {
						t.Errorf("%d lanes wait, of %d that are open", waiting, lanes)
						break
					}
					if ended {
						break
					}
				}
				if most > 3*crowded {
					t.Errorf("%d KiB of answers are queued", most>>10)
				}
				c.Sever()
				wg.Wait()
			})
		})
	}
}

package http2

import (
	"bytes"
	"io"
	"strings"
	"testing"
	"time"
)

// A reader is told the same of a request whether its body comes at once, and is
// put behind its head, or in pieces.
func TestJoinedBodies(t *testing.T) {
	for _, tt := range []struct {
		name   string
		fields []string
		body   string
		joined bool
		want   string // behind the head
	}{
		{"of known length", []string{"content-length", "5"}, "hello", true, "hello"},
		{"in chunks", nil, "hello world, hello", true, "12\r\nhello world, hello\r\n0\r\n\r\n"},
		{"before trailers", []string{"te", "trailers"}, "hello", true, "5\r\nhello\r\n0\r\nx-trailer: v\r\n\r\n"},
		{"large", nil, strings.Repeat("x", maxJoined), false, "800\r\n" + strings.Repeat("x", maxJoined) + "\r\n0\r\n\r\n"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			sent := append([]byte(Preface), appendSettings(nil)...)
			sent = appendHeaders(sent, 1, false, seed(func(enc func(...string) []byte) []byte { return enc(request("POST", tt.fields...)...) }))
			if strings.Contains(tt.want, "x-trailer") {
				sent = append(appendHeader(sent, len(tt.body), kindData, 0, 1), tt.body...)
				sent = appendHeaders(sent, 1, true, appendLine(nil, []byte("x-trailer"), []byte("v")))
			} else {
				sent = append(appendHeader(sent, len(tt.body), kindData, flagEnd, 1), tt.body...)
			}
			for _, piece := range []int{len(sent), 1} {
				var l *Lane
				c := newConn(&memory{in: bytes.NewReader(nil), shut: make(chan struct{})}, Config{}, func(x *Lane) bool {
					l = x
					return true
				})
				for at, end := 0, 0; end < len(sent); {
					end = min(end+piece, len(sent))
					n, err := c.frames(sent[at:end])
					if err != nil {
						t.Fatal(err)
					}
					at += n
				}
				if err := c.announce(nil); err != nil {
					t.Fatal(err)
				}
				if joined := l.got.joined > 0; joined != (tt.joined && piece > 1) {
					t.Errorf("in pieces of %d: joined %v", piece, joined)
				}
				var got strings.Builder
				for buf := make([]byte, 3000); ; {
					l.mu.Lock()
					n, _ := l.got.take(buf)
					l.mu.Unlock()
					if n == 0 {
						break
					}
					got.Write(buf[:n])
				}
				_, text, _ := strings.Cut(got.String(), "\r\n\r\n")
				if text != tt.want {
					t.Errorf("in pieces of %d: %.60q, want %.60q", piece, text, tt.want)
				}
			}
		})
	}
}

// A body that is shorter than it was announced is not read as a whole one.
func TestShortBodyIsNotJoined(t *testing.T) {
	dial := served(t, Config{}, func(l *Lane) {
		if got, err := io.ReadAll(l); err == nil || strings.HasSuffix(string(got), "hell") && !strings.Contains(err.Error(), "reset") {
			t.Errorf("read %q, %v", got, err)
		}
	})
	p := speak(t, dial)
	p.head(1, false, request("POST", "content-length", "5")...)
	_ = p.WriteData(1, true, []byte("hell"))
	if got := p.outcome(1); got != "reset 1" {
		t.Errorf("got %s", got)
	}
	_ = p.nc.SetDeadline(time.Now())
	p.nc.Close()
}

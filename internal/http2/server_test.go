package http2

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"strings"
	"sync"
	"testing"
)

// served is a server whose lanes serve handles; dial connects to it.
func served(t testing.TB, cfg Config, serve func(*Lane)) (dial func() net.Conn) {
	t.Helper()
	return servedBy(t, cfg, nil, serve)
}

// servedBy is served that gives the connections, too.
func servedBy(t testing.TB, cfg Config, conns chan<- *Conn, serve func(*Lane)) (dial func() net.Conn) {
	t.Helper()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	var wg sync.WaitGroup
	var mu sync.Mutex
	open := map[*Conn]struct{}{}
	wg.Go(func() {
		for {
			nc, err := ln.Accept()
			if err != nil {
				return
			}
			c := Accepted(nc, cfg, func(l *Lane) bool {
				wg.Go(func() {
					defer l.Close()
					serve(l)
				})
				return true
			})
			mu.Lock()
			open[c] = struct{}{}
			mu.Unlock()
			if conns != nil {
				conns <- c
			}
			wg.Go(func() { _ = c.Run() })
		}
	})
	t.Cleanup(func() {
		ln.Close()
		mu.Lock()
		for c := range open {
			c.Sever()
		}
		mu.Unlock()
		wg.Wait()
	})
	return func() net.Conn {
		nc, err := net.Dial("tcp", ln.Addr().String())
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { nc.Close() })
		return nc
	}
}

// handled has a handler of net/http answer on a lane, one call after the other.
func handled(h http.HandlerFunc) func(*Lane) {
	return func(l *Lane) {
		br := bufio.NewReader(l)
		for {
			r, err := http.ReadRequest(br)
			if err != nil {
				return
			}
			w := &answerer{l: l, head: http.Header{}, method: r.Method}
			h(w, r)
			if w.end() != nil {
				return
			}
			if _, err := io.Copy(io.Discard, r.Body); err != nil {
				return
			}
		}
	}
}

// answerer writes an answer in chunks, with trailers.
type answerer struct {
	l      *Lane
	head   http.Header
	method string
	begun  bool
	err    error
}

func (w *answerer) Header() http.Header { return w.head }

func (w *answerer) WriteHeader(status int) {
	if w.begun {
		return
	}
	w.begun = true
	var b bytes.Buffer
	fmt.Fprintf(&b, "HTTP/1.1 %d %s\r\n", status, http.StatusText(status))
	_ = w.head.WriteSubset(&b, map[string]bool{"X-Trailer": true})
	b.WriteString("Transfer-Encoding: chunked\r\n\r\n")
	_, w.err = w.l.Write(b.Bytes())
}

func (w *answerer) Write(p []byte) (int, error) {
	w.WriteHeader(200)
	if w.err == nil && len(p) > 0 && w.method != "HEAD" {
		_, w.err = fmt.Fprintf(w.l, "%x\r\n%s\r\n", len(p), p)
	}
	return len(p), w.err
}

func (w *answerer) end() error {
	w.WriteHeader(200)
	if w.err == nil && w.method != "HEAD" {
		last := "0\r\n"
		if v := w.head.Get("X-Trailer"); v != "" {
			last += "X-Trailer: " + v + "\r\n"
		}
		_, w.err = io.WriteString(w.l, last+"\r\n")
	}
	return w.err
}

// client is net/http's, with prior knowledge.
func client(t *testing.T, dial func() net.Conn) *http.Client {
	tr := &http.Transport{Protocols: new(http.Protocols), DialContext: func(context.Context, string, string) (net.Conn, error) { return dial(), nil }}
	tr.Protocols.SetUnencryptedHTTP2(true)
	tr.MaxConnsPerHost = 1 // or dials that no call waits for may outlive the test
	t.Cleanup(tr.CloseIdleConnections)
	return &http.Client{Transport: tr}
}

func TestCallsOfNetHTTP(t *testing.T) {
	dial := served(t, Config{}, handled(func(w http.ResponseWriter, r *http.Request) {
		b, err := io.ReadAll(r.Body)
		if err != nil && !errors.Is(err, io.EOF) {
			t.Error(err)
		}
		w.Header().Set("X-Seen", fmt.Sprint(r.Method, " ", r.Host, " ", r.URL, " ", r.ContentLength, " ", r.Header.Get("Cookie")))
		w.Header().Set("X-Trailer", "last")
		_, _ = w.Write(b)
	}))
	c := client(t, dial)
	long := strings.Repeat("0123456789abcdef", 40000)
	var wg sync.WaitGroup
	for i := range 40 {
		wg.Go(func() {
			for _, tt := range []struct {
				method string
				body   io.Reader
				want   string
				length int64
			}{
				{"GET", nil, "", 0},
				{"POST", strings.NewReader("hello"), "hello", 5},
				{"PUT", io.MultiReader(strings.NewReader("of no "), strings.NewReader("known length")), "of no known length", -1},
				{"POST", strings.NewReader(long), long, int64(len(long))},
				{"PUT", io.MultiReader(strings.NewReader(long), strings.NewReader("end")), long + "end", -1},
			} {
				r, _ := http.NewRequest(tt.method, fmt.Sprintf("http://billing.example/%d?q", i), tt.body)
				r.AddCookie(&http.Cookie{Name: "a", Value: "1"})
				r.AddCookie(&http.Cookie{Name: "b", Value: "2"})
				resp, err := c.Do(r)
				if err != nil {
					t.Error(err)
					return
				}
				b, err := io.ReadAll(resp.Body)
				resp.Body.Close()
				seen := fmt.Sprintf("%s billing.example /%d?q %d a=1; b=2", tt.method, i, tt.length)
				if err != nil || string(b) != tt.want || resp.Header.Get("X-Seen") != seen || resp.Trailer.Get("X-Trailer") != "last" {
					t.Errorf("%s: got %d bytes of %d, %v, %q, trailers %v", tt.method, len(b), len(tt.want), err, resp.Header, resp.Trailer)
				}
			}
		})
	}
	wg.Wait()
}

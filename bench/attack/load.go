package main

import (
	"bufio"
	"bytes"
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"io"
	"log"
	"net"
	"net/http"
	"os"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"sallyport/bench/rig"
)

// An order is the calls of honest clients, by the HTTP proxy of their sidecar.
type order struct {
	Proxy string        `json:"proxy"`
	Host  string        `json:"host"`
	Roots string        `json:"roots"` // of a host outside, which is reached by a tunnel
	Conns int           `json:"conns"`
	Rate  int           `json:"rate"` // calls a second
	Warm  time.Duration `json:"warm"` // not counted
	For   time.Duration `json:"for"`
}

// patience bounds every single answer.
const patience = 20 * time.Second

func (o order) run(warm func()) rig.Calls {
	var counting, over atomic.Bool
	var mu sync.Mutex // guards what follows
	var took []float64
	out := rig.Calls{}
	var standing, all sync.WaitGroup
	standing.Add(o.Conns)
	start := make(chan time.Time)
	for n := range o.Conns {
		all.Go(func() {
			c, err := o.dial()
			standing.Done()
			due := <-start
			var mine []float64
			if err == nil {
				gap := time.Second * time.Duration(o.Conns) / time.Duration(o.Rate)
				mine, err = o.calls(c, due.Add(gap*time.Duration(n)/time.Duration(o.Conns)), gap, &counting, &over)
			}
			mu.Lock()
			defer mu.Unlock()
			if took = append(took, mine...); err != nil {
				out.Failed++
				out.Fault = err.Error()
			}
		})
	}
	standing.Wait()
	now := time.Now()
	for range o.Conns {
		start <- now
	}
	time.Sleep(o.Warm)
	counting.Store(true)
	from := time.Now()
	warm()
	time.Sleep(o.For)
	counting.Store(false)
	out.Seconds = time.Since(from).Seconds()
	over.Store(true)
	all.Wait()
	out.Requests = int64(len(took))
	out.P50, out.P99 = rig.Quantile(took, 0.5), rig.Quantile(took, 0.99)
	return out
}

func (o order) calls(c net.Conn, due time.Time, gap time.Duration, counting, over *atomic.Bool) (took []float64, err error) {
	defer c.Close()
	target := small
	if o.Roots == "" {
		target = "http://" + o.Host + target
	}
	request := fmt.Appendf(nil, "GET %s HTTP/1.1\r\nHost: %s\r\n\r\n", target, o.Host)
	r := bufio.NewReader(c)
	for !over.Load() {
		time.Sleep(time.Until(due))
		_ = c.SetDeadline(time.Now().Add(patience))
		if _, err := c.Write(request); err != nil {
			return took, err
		}
		if err := rig.SkipAnswer(r); err != nil {
			return took, err
		}
		if counting.Load() {
			took = append(took, float64(time.Since(due))/1e6)
		}
		due = due.Add(gap)
	}
	return took, nil
}

// dial connects to the proxy, and through it to a host outside.
func (o order) dial() (net.Conn, error) {
	c, err := net.Dial("tcp", o.Proxy)
	if err != nil || o.Roots == "" {
		return c, err
	}
	_ = c.SetDeadline(time.Now().Add(patience))
	t, err := tunnel(c, o.Roots)
	if err != nil {
		c.Close()
		return nil, err
	}
	return t, nil
}

// tunnel asks a proxy for the host outside and begins TLS with that.
func tunnel(c net.Conn, roots string) (net.Conn, error) {
	if _, err := fmt.Fprintf(c, "CONNECT %s:443 HTTP/1.1\r\nHost: %s:443\r\n\r\n", outside, outside); err != nil {
		return nil, err
	}
	line := make([]byte, 0, 512)
	for !bytes.HasSuffix(line, []byte("\r\n\r\n")) {
		var b [1]byte
		if _, err := c.Read(b[:]); err != nil {
			return nil, err
		}
		line = append(line, b[0])
	}
	if !strings.HasPrefix(string(line), "HTTP/1.1 200") {
		return nil, fmt.Errorf("tunnel: answered %q", line)
	}
	text, err := os.ReadFile(roots)
	if err != nil {
		return nil, err
	}
	pool := x509.NewCertPool()
	pool.AppendCertsFromPEM(text)
	t := tls.Client(c, &tls.Config{MinVersion: tls.VersionTLS13, ServerName: outside, RootCAs: pool})
	return t, t.Handshake()
}

// What can be asked for: a little, and more than anybody buffers.
const (
	small, much = "/v1/1", "/v1/much"
	muchBytes   = 16 << 20
)

// answerOn serves both until the listener is closed.
func answerOn(l net.Listener) error {
	body := make([]byte, 64<<10)
	serve := func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path == small {
			_, _ = w.Write(body[:1<<10]) // who asked sees a failure
			return
		}
		w.Header().Set("Content-Length", fmt.Sprint(muchBytes))
		for range muchBytes / len(body) {
			if _, err := w.Write(body); err != nil {
				return
			}
		}
	}
	s := &http.Server{Handler: http.HandlerFunc(serve), ErrorLog: log.New(io.Discard, "", 0)}
	return s.Serve(l)
}

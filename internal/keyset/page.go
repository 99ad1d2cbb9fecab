package keyset

import (
	"context"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"

	"sallyport/internal/daemon"
	"sallyport/internal/jose"
	"sallyport/internal/mesh"
)

const (
	maxDocument  = 256 << 10 // bytes of a key set
	maxRedirects = 3
)

// A page is where an issuer publishes its keys.
type page struct {
	url    string
	client *http.Client
}

// newPage makes the client of one page: https only, to the one host.
func newPage(cfg *Config, src mesh.KeySet) (*page, error) {
	u, err := url.Parse(src.URL)
	if err != nil || u.Scheme != "https" || u.Host == "" || u.User != nil {
		return nil, errors.New("page is not a plain https URL")
	}
	conf := &tls.Config{MinVersion: tls.VersionTLS12}
	if src.CA != "" {
		conf.RootCAs = x509.NewCertPool()
		if !conf.RootCAs.AppendCertsFromPEM([]byte(src.CA)) {
			return nil, errors.New("ca holds no certificate in PEM")
		}
	}
	return &page{url: src.URL, client: &http.Client{
		Timeout: fetchTimeout,
		Transport: &http.Transport{
			DialContext: cfg.Dial, TLSClientConfig: conf, ForceAttemptHTTP2: true, DisableCompression: true,
			MaxResponseHeaderBytes: 64 << 10, MaxIdleConns: 1, IdleConnTimeout: time.Minute,
		},
		CheckRedirect: func(req *http.Request, via []*http.Request) error {
			if req.URL.Scheme != "https" || req.URL.Host != u.Host {
				return errors.New("page sends to another host")
			}
			if len(via) > maxRedirects {
				return errors.New("page sends on and on")
			}
			return nil
		},
	}}, nil
}

// fetch asks the page; an answer without keys confirms those of old.
func (p *page) fetch(ctx context.Context, old *held, now time.Time) (*held, error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, p.url, nil)
	if err != nil {
		return nil, err
	}
	req.Header.Set("Accept", "application/jwk-set+json, application/json")
	if old != nil && old.etag != "" {
		req.Header.Set("If-None-Match", old.etag)
	}
	resp, err := p.client.Do(req)
	if err != nil {
		return nil, fmt.Errorf("fetch %s: %w", p.url, errors.Unwrap(err))
	}
	defer resp.Body.Close()
	h := &held{got: now, next: now.Add(spread(maxAgeOf(resp.Header.Get("Cache-Control"))))}
	if resp.StatusCode == http.StatusNotModified && old != nil {
		return h, nil
	}
	if resp.StatusCode != http.StatusOK {
		return nil, fmt.Errorf("fetch %s: status %d", p.url, resp.StatusCode)
	}
	if h.doc, err = io.ReadAll(io.LimitReader(resp.Body, maxDocument+1)); err != nil {
		return nil, fmt.Errorf("fetch %s: %w", p.url, err)
	}
	if len(h.doc) > maxDocument {
		return nil, fmt.Errorf("fetch %s: more than %d bytes", p.url, maxDocument)
	}
	if h.keys, err = parseKeys(h.doc); err != nil {
		return nil, fmt.Errorf("fetch %s: %w", p.url, err)
	}
	if e := resp.Header.Get("ETag"); len(e) <= 256 {
		h.etag = e
	}
	return h, nil
}

// maxAgeOf reads how long an answer may be used without asking.
func maxAgeOf(cacheControl string) time.Duration {
	for d := range strings.SplitSeq(cacheControl, ",") {
		if v, ok := strings.CutPrefix(strings.ToLower(strings.TrimSpace(d)), "max-age="); ok {
			if n, err := strconv.ParseUint(strings.Trim(v, `"`), 10, 31); err == nil {
				return min(max(time.Duration(n)*time.Second, minAge), maxAge)
			}
		}
	}
	return defaultAge
}

// spread gives half to four fifths of an age, so that a fleet does not ask at
// one moment.
func spread(age time.Duration) time.Duration {
	return age/2 + rand.N(age*3/10)
}

// screened dials what a key page can be at. A link-local address is where
// clouds keep credentials, and no issuer.
func screened() *net.Dialer {
	return &net.Dialer{Timeout: fetchTimeout, Control: func(_, address string, _ syscall.RawConn) error {
		a, err := netip.ParseAddrPort(address)
		if err != nil {
			return err
		}
		ip := a.Addr().Unmap()
		if ip.IsLinkLocalUnicast() || ip.IsMulticast() || ip.IsUnspecified() || metadata[ip] {
			return fmt.Errorf("%s is not where an issuer of tokens is", ip)
		}
		return nil
	}}
}

// metadata are the addresses of clouds' metadata services that are not
// link-local.
var metadata = map[netip.Addr]bool{
	netip.MustParseAddr("100.100.100.200"): true, netip.MustParseAddr("168.63.129.16"): true,
	netip.MustParseAddr("192.0.0.192"): true, netip.MustParseAddr("fd00:ec2::254"): true,
	netip.MustParseAddr("fd20:ce::254"): true,
}

// readFile reads keys of a file.
func readFile(path string, now time.Time) (*held, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	doc, err := io.ReadAll(io.LimitReader(f, maxDocument+1))
	if err != nil {
		return nil, err
	}
	if len(doc) > maxDocument {
		return nil, fmt.Errorf("%s has more than %d bytes", path, maxDocument)
	}
	keys, err := parseKeys(doc)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	return &held{keys: keys, doc: doc, got: now, next: now.Add(fileEvery)}, nil
}

// kept is a page's answer on disk.
type kept struct {
	URL  string          `json:"url"`
	Got  time.Time       `json:"got"`
	Next time.Time       `json:"next"`
	ETag string          `json:"etag,omitempty"`
	Doc  json.RawMessage `json:"keys"`
}

// file is named by issuer and page, whose texts a file name cannot hold.
func (s *set) file() string {
	sum := sha256.Sum256([]byte(s.issuer + "\n" + s.source.URL + "\n" + s.source.CA))
	return filepath.Join(s.cfg.Dir, hex.EncodeToString(sum[:16])+".json")
}

func (s *set) save(h *held) error {
	if s.cfg.Dir == "" {
		return nil
	}
	b, err := json.Marshal(kept{URL: s.source.URL, Got: h.got, Next: h.next, ETag: h.etag, Doc: h.doc})
	if err != nil {
		return err
	}
	if err := os.MkdirAll(s.cfg.Dir, 0o700); err != nil {
		return err
	}
	return daemon.WriteFile(s.file(), b, 0o600)
}

// load takes what was kept. A file that is damaged or too old is as none.
func (s *set) load() {
	if s.cfg.Dir == "" {
		return
	}
	b, err := os.ReadFile(s.file())
	if errors.Is(err, os.ErrNotExist) {
		return
	}
	var k kept
	var keys jose.Keys
	if err == nil {
		if err = json.Unmarshal(b, &k); err == nil {
			keys, err = parseKeys(k.Doc)
		}
	}
	now := time.Now()
	h := &held{keys: keys, etag: k.ETag, doc: k.Doc, got: k.Got, next: k.Next}
	if err != nil || k.URL != s.source.URL || k.Got.IsZero() || k.Got.After(now) || !h.fresh(now) {
		s.cfg.Log.Warn("kept keys of an issuer of tokens are not used", "issuer", s.issuer, "got", k.Got, "err", err)
		return
	}
	s.cur.Store(h)
}

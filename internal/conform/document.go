package conform

import (
	"bytes"
	"context"
	"crypto"
	"crypto/tls"
	"crypto/x509"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"unicode/utf8"

	"sallyport/internal/jose"
	"sallyport/internal/svid"
)

// documentMusts are the demands that a bundle endpoint shows.
var documentMusts = []int{34, 35, 36, 37, 52, 53, 72, 73, 74, 75, 78, 79, 81, 84, 87, 88, 89, 90, 92}

// maxDocument bounds what is read of an answer, bytes.
const maxDocument = 1 << 20

// A document is the bundle that an endpoint publishes.
type document struct {
	keys     []byte // the element of that name, in one form
	sequence json.Number
	x509     []*x509.Certificate
	kids     []string
}

// checkURL is the form of an endpoint's URL.
func checkURL(s string) error {
	u, err := url.Parse(s)
	switch {
	case err != nil || u.Scheme != "https" || u.Hostname() == "":
		return fmt.Errorf("%q is not an https URL", s)
	case u.User != nil:
		return errors.New("it has user information")
	}
	return nil
}

// documents looks at the bundle endpoint.
func (v *survey) documents() {
	if v.cfg.BundleEndpoint == "" {
		v.skip("no bundle endpoint is named: --bundle-endpoint", documentMusts...)
		return
	}
	const by = "the bundle endpoint"
	v.say(by, checkURL(v.cfg.BundleEndpoint), 87)
	body, chain, err := v.get(v.cfg.BundleEndpoint)
	v.say(by, err, 90)
	if err != nil && v.asked.Load() {
		v.say(by, fmt.Errorf("it asks for a client certificate, and without one: %w", err), 89)
	}
	if err != nil {
		return
	}
	v.say(by, nil, 83, 89) // it answered, and was shown no certificate
	v.proof(chain)
	v.tls()
	v.say(by, fails(utf8.Valid(body), "the document is not UTF-8"), 90)
	v.doc = v.read(body)
	if v.doc == nil {
		return
	}
	v.say(by, nil, 72) // what it says stands in the parameters that are known
	same := len(v.doc.x509) == len(v.roots) && !slices.ContainsFunc(v.doc.x509, func(c *x509.Certificate) bool { return !slices.ContainsFunc(v.roots, c.Equal) })
	v.say(by, fails(same, "it has other X.509 authorities than the server trusts"), 34, 90)
	for _, kid := range v.kids {
		v.say(by, fails(slices.Contains(v.doc.kids, kid), "it lacks the JWT key %.50q", kid), 52, 90)
	}
}

// documentsAgain reads it once more, after SVIDs were signed.
func (v *survey) documentsAgain() {
	if v.doc == nil {
		return
	}
	body, _, err := v.get(v.cfg.BundleEndpoint)
	if err != nil {
		v.say("the bundle endpoint, again", err, 90)
		return
	}
	next := v.read(body)
	if next == nil || v.doc.sequence == "" || next.sequence == "" {
		return
	}
	was, err := v.doc.sequence.Int64()
	now, nerr := next.sequence.Int64()
	if err != nil || nerr != nil {
		return // read has said so
	}
	changed := !bytes.Equal(v.doc.keys, next.keys)
	v.say("the bundle endpoint, again", fails(now >= was && (!changed || now > was), "spiffe_sequence went from %d to %d, and the keys changed: %t", was, now, changed), 73)
}

// get reads a public document and gives what the endpoint proved. It follows a
// redirect only as a client of the endpoint may.
func (v *survey) get(address string) ([]byte, []*x509.Certificate, error) {
	tr := &http.Transport{
		TLSClientConfig: &tls.Config{
			MinVersion: tls.VersionTLS12, InsecureSkipVerify: true, // what it proves is looked at afterwards, by number
			GetClientCertificate: func(*tls.CertificateRequestInfo) (*tls.Certificate, error) {
				v.asked.Store(true)
				return &tls.Certificate{}, nil
			},
		}, DisableKeepAlives: true,
	}
	defer tr.CloseIdleConnections()
	c := &http.Client{Transport: tr, CheckRedirect: func(req *http.Request, via []*http.Request) error {
		if len(via) > 3 {
			return errors.New("it redirects more than three times")
		}
		err := checkURL(req.URL.String())
		v.say("a redirect of "+address, err, 91)
		return err
	}}
	ctx, cancel := v.within()
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, address, nil)
	if err != nil {
		return nil, nil, err
	}
	resp, err := c.Do(req)
	if err != nil {
		return nil, nil, err
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(io.LimitReader(resp.Body, maxDocument))
	if err == nil && resp.StatusCode != http.StatusOK {
		err = fmt.Errorf("it answers %s", resp.Status)
	}
	return body, resp.TLS.PeerCertificates, err
}

// proof holds what the endpoint showed to its profile: one that shows a SPIFFE
// ID is of https_spiffe.
func (v *survey) proof(chain []*x509.Certificate) {
	const by = "the bundle endpoint's certificate"
	if uris, err := svid.URINames(chain[0]); err == nil && len(uris) == 1 && strings.HasPrefix(uris[0], "spiffe://") {
		v.say(by, v.chain(by, chain, v.roots, ""), 92)
		v.skip("the endpoint is of the profile https_spiffe", 88)
		return
	}
	v.skip("the endpoint is of the profile https_web", 92)
	v.say(by, v.webProof(v.cfg.BundleEndpoint, chain), 88)
}

// webProof verifies a certificate for the host of a URL.
func (v *survey) webProof(address string, chain []*x509.Certificate) error {
	u, err := url.Parse(address)
	if err != nil {
		return err
	}
	o := x509.VerifyOptions{Roots: v.cfg.WebRoots, Intermediates: x509.NewCertPool(), DNSName: u.Hostname()}
	for _, c := range chain[1:] {
		o.Intermediates.AddCert(c)
	}
	_, err = chain[0].Verify(o)
	return err
}

// tls tries what Mozilla's intermediate profile does not have.
func (v *survey) tls() {
	u, err := url.Parse(v.cfg.BundleEndpoint)
	if err != nil {
		return
	}
	addr := u.Host
	if u.Port() == "" {
		addr = net.JoinHostPort(u.Hostname(), "443")
	}
	for _, t := range []struct {
		name string
		ok   bool
		c    *tls.Config
	}{
		{"TLS 1.2 or 1.3", true, &tls.Config{MinVersion: tls.VersionTLS12}},
		{"TLS 1.0", false, &tls.Config{MinVersion: tls.VersionTLS10, MaxVersion: tls.VersionTLS10}},
		{"TLS 1.1", false, &tls.Config{MinVersion: tls.VersionTLS11, MaxVersion: tls.VersionTLS11}},
		{"a key exchange by RSA", false, &tls.Config{MaxVersion: tls.VersionTLS12, CipherSuites: []uint16{tls.TLS_RSA_WITH_AES_128_GCM_SHA256, tls.TLS_RSA_WITH_AES_128_CBC_SHA}}},
		{"a cipher in CBC mode", false, &tls.Config{MaxVersion: tls.VersionTLS12, CipherSuites: []uint16{tls.TLS_ECDHE_RSA_WITH_AES_128_CBC_SHA, tls.TLS_ECDHE_ECDSA_WITH_AES_128_CBC_SHA}}},
	} {
		t.c.InsecureSkipVerify, t.c.ServerName = true, u.Hostname()
		ctx, cancel := context.WithTimeout(v.ctx, patience)
		conn, err := (&tls.Dialer{Config: t.c}).DialContext(ctx, "tcp", addr)
		cancel()
		if err == nil {
			conn.Close()
		}
		if t.ok {
			v.say(t.name, err, 84)
		} else {
			v.say(t.name, fails(err != nil, "it is accepted"), 84)
		}
	}
}

// read holds a bundle document to the specification. It is nil when there is
// nothing to be read.
func (v *survey) read(body []byte) *document {
	const by = "the bundle document"
	o, err := jose.ParseObject(body)
	v.say(by, err, 75, 90)
	if err != nil {
		return nil
	}
	d := new(document)
	if s, has := o["spiffe_sequence"]; has {
		d.sequence, _ = s.(json.Number)
		_, err := strconv.ParseUint(d.sequence.String(), 10, 64)
		v.say(by, fails(err == nil, "spiffe_sequence is %.50v", s), 73)
	} else {
		v.skip("the document has no spiffe_sequence", 73)
	}
	if h, has := o["spiffe_refresh_hint"]; has {
		n, _ := h.(json.Number)
		_, err := strconv.ParseUint(n.String(), 10, 64)
		v.say(by, fails(err == nil, "spiffe_refresh_hint is %.50v", h), 74)
	} else {
		v.skip("the document has no spiffe_refresh_hint", 74)
	}
	keys, ok := o["keys"].([]any)
	v.say(by, fails(ok, "keys is not there, or no list"), 75)
	d.keys, _ = json.Marshal(keys)
	for i, k := range keys {
		e, _ := k.(map[string]any)
		v.element(fmt.Sprintf("%s, key %d", by, i+1), e, d)
	}
	return d
}

// element holds one key of the document to the specification.
func (v *survey) element(what string, e map[string]any, d *document) {
	kty, _ := e["kty"].(string)
	use, _ := e["use"].(string)
	kid, hasKid := e["kid"].(string)
	x5c, hasX5c := e["x5c"].([]any)
	v.say(what, fails(kty != "", "kty is missing"), 78)
	v.say(what, fails(use != "", "use is missing"), 79)
	switch use {
	case "x509-svid":
		v.say(what, fails(e["kid"] == nil, "it has the kid %.50v", e["kid"]), 35)
		v.say(what, fails(len(x5c) == 1, "x5c has %d values", len(x5c)), 37)
		c, err := certificate(e, x5c)
		v.say(what, err, 36)
		if err == nil {
			d.x509 = append(d.x509, c)
		}
		v.say(what, nil, 34)
	case "jwt-svid":
		v.say(what, fails(kid != "" && !slices.Contains(d.kids, kid), "its kid %.50q is empty or stands twice", kid), 53)
		v.say(what, fails(!hasX5c, "it has a certificate"), 52)
		d.kids = append(d.kids, kid)
	default:
		v.say(what, fails(!hasX5c, "it has a certificate, and use %.50q", use), 34)
		v.say(what, fails(!hasKid || use != "" && use != "sig", "it has a kid, and use %.50q", use), 52)
	}
}

// certificate is the first of x5c, whose key is that of the element.
func certificate(e map[string]any, x5c []any) (*x509.Certificate, error) {
	if len(x5c) == 0 {
		return nil, errors.New("x5c is missing")
	}
	s, _ := x5c[0].(string)
	der, err := base64.StdEncoding.Strict().DecodeString(s)
	if err != nil {
		return nil, errors.New("x5c is not base64")
	}
	c, err := x509.ParseCertificate(der)
	if err != nil {
		return nil, errors.New("x5c is not the DER of a certificate")
	}
	if !c.IsCA {
		return nil, errors.New("x5c is not a CA's")
	}
	return c, sameKey(c.PublicKey, e)
}

// sameKey compares a key with the parameters of a JWK.
func sameKey(key crypto.PublicKey, e map[string]any) error {
	for name, want := range jwk(key) {
		if e[name] != want {
			return fmt.Errorf("%s is not that of the certificate's key", name)
		}
	}
	return nil
}

// oidc looks at the discovery document and its keys.
func (v *survey) oidc() {
	if v.cfg.OIDC == "" {
		return // the bundle document shows the same demands
	}
	const by = "OIDC discovery"
	body, chain, err := v.get(v.cfg.OIDC + "/.well-known/openid-configuration")
	var o map[string]any
	if err == nil {
		o, err = jose.ParseObject(body)
	}
	v.say(by, err, 53)
	if err != nil {
		return
	}
	web := v.webProof(v.cfg.OIDC, chain)
	if web != nil {
		web = errors.Join(web, verify(chain, v.roots))
		if verify(chain, v.roots) == nil {
			web = nil // the trust domain's own authority vouches for it
		}
	}
	v.say(by, web, 84)
	v.say(by, fails(o["issuer"] == v.cfg.OIDC, "issuer is %.100v, not %s", o["issuer"], v.cfg.OIDC), 53)
	algs, _ := o["id_token_signing_alg_values_supported"].([]any)
	for _, a := range algs {
		s, _ := a.(string)
		_, nine := algorithms[s]
		v.say(by, fails(nine, "it offers the alg %.20v", a), 42)
	}
	jwks, _ := o["jwks_uri"].(string)
	if err := checkURL(jwks); err != nil {
		v.say(by, fmt.Errorf("jwks_uri: %w", err), 53)
		return
	}
	body, _, err = v.get(jwks)
	if err == nil {
		o, err = jose.ParseObject(body)
	}
	v.say("jwks_uri", err, 53)
	if err != nil {
		return
	}
	keys, _ := o["keys"].([]any)
	var kids []string
	for _, k := range keys {
		e, _ := k.(map[string]any)
		kid, _ := e["kid"].(string)
		kty, _ := e["kty"].(string)
		v.say("jwks_uri", fails(kid != "", "a key has no kid"), 53)
		v.say("jwks_uri", fails(kty != "", "a key has no kty"), 78)
		kids = append(kids, kid)
	}
	for _, kid := range v.kids {
		v.say("jwks_uri", fails(slices.Contains(kids, kid), "it lacks the key %.50q of GetBundle", kid), 53)
	}
}

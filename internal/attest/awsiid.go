package attest

import (
	"bytes"
	"cmp"
	"context"
	"crypto"
	"crypto/rsa"
	"crypto/x509"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"net/http"
	"regexp"
	"slices"
	"strings"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"sallyport/internal/jose"
	"sallyport/internal/mesh"
)

// AWSIID is the name of the attestation by the instance identity document of
// Amazon EC2.
const AWSIID = "aws_iid"

const (
	awsMetadata = "http://169.254.169.254"
	awsMaxAge   = 24 * time.Hour
	maxMetadata = 64 << 10 // bytes of one answer
)

var (
	awsAccount  = regexp.MustCompile(`^[0-9]{12}$`)
	awsRegion   = regexp.MustCompile(`^[a-z]{2,4}(-[a-z]+)+-[0-9]+$`)
	awsInstance = regexp.MustCompile(`^i-[0-9a-f]{8,17}$`)
)

// AWSIIDConfig says which instances admit a node.
type AWSIIDConfig struct {
	// Accounts that instances belong to, 12 digits each. Required.
	Accounts []string `yaml:"accounts"`
	// Certificates are PEM files with AWS's public RSA-2048 certificate for
	// instance identity documents, by region. Other regions are refused.
	// Required.
	Certificates map[string]string `yaml:"certificates"`
	// MaxAge is how long after its launch an instance may attest for the first
	// time. Default 24 h.
	MaxAge time.Duration `yaml:"max_age"`
}

func (c *AWSIIDConfig) validate(field string) []error {
	var errs []error
	need := func(ok bool, name, what string) {
		if !ok {
			errs = append(errs, fmt.Errorf("%s.%s: %s", field, name, what))
		}
	}
	need(len(c.Accounts) > 0, "accounts", "missing; write your account numbers, or anybody's instances could join")
	for i, a := range c.Accounts {
		need(awsAccount.MatchString(a), fmt.Sprintf("accounts[%d]", i), fmt.Sprintf("%q is not 12 digits", a))
	}
	need(len(c.Certificates) > 0, "certificates", "missing; write region: file with AWS's public RSA-2048 certificate of each region")
	for _, r := range slices.Sorted(maps.Keys(c.Certificates)) {
		need(awsRegion.MatchString(r), "certificates", fmt.Sprintf("%q is not a region such as eu-central-1", r))
	}
	need(c.MaxAge >= 0, "max_age", fmt.Sprintf("%s is negative", c.MaxAge))
	return errs
}

// NewAWSIID verifies instance identity documents by their RSA-2048 signature.
// The payload is SPIRE's: {"document", "signature", "rsa2048"}; the older
// signature, by a key of 1,024 bits, is not looked at. An instance counts for
// the first key that shows its document, for ever. Agents are named
// spiffe://TD/spire/agent/aws_iid/ACCOUNT/REGION/INSTANCE.
func NewAWSIID(td spiffeid.TrustDomain, c AWSIIDConfig, seen Seen) (NodeVerifier, error) {
	c.MaxAge = cmp.Or(c.MaxAge, awsMaxAge)
	v := &awsIID{td: td, cfg: c, seen: seen, now: time.Now, certs: map[string][]*x509.Certificate{}}
	for region, file := range c.Certificates {
		certs, err := readCertificates(file)
		if err != nil {
			return nil, fmt.Errorf("aws_iid.certificates.%s: %w", region, err)
		}
		for _, x := range certs {
			if k, ok := x.PublicKey.(*rsa.PublicKey); !ok || k.N.BitLen() < minRSA {
				return nil, fmt.Errorf("aws_iid.certificates.%s: %s is not the RSA-2048 certificate", region, file)
			}
		}
		v.certs[region] = certs
	}
	return v, nil
}

type awsIID struct {
	td    spiffeid.TrustDomain
	cfg   AWSIIDConfig
	seen  Seen
	now   func() time.Time
	certs map[string][]*x509.Certificate // by region
}

func (v *awsIID) Verify(ctx context.Context, payload []byte, key crypto.PublicKey) (spiffeid.ID, []mesh.Selector, error) {
	id, sel, err := v.verify(ctx, payload, key)
	if err != nil {
		return spiffeid.ID{}, nil, err
	}
	return id, sel, nil
}

func (v *awsIID) verify(ctx context.Context, payload []byte, key crypto.PublicKey) (id spiffeid.ID, sel []mesh.Selector, err error) {
	keyHash, err := begin(ctx, AWSIID, payload, key)
	if err != nil {
		return id, nil, err
	}
	doc, sig, err := parseAWSPayload(payload)
	if err != nil {
		return id, nil, refused("aws_iid: %v", err)
	}
	d, err := jose.ParseObject(doc)
	if err != nil {
		return id, nil, refused("aws_iid: document: %v", err)
	}
	region, _ := d["region"].(string)
	certs := v.certs[region]
	if certs == nil {
		return id, nil, refused("aws_iid: the region is not configured")
	}
	for _, c := range certs { // more than one while AWS replaces it
		if err = sig.verify(doc, c); err == nil {
			if slices.ContainsFunc(sig.certs, func(x *x509.Certificate) bool { return !x.Equal(c) }) {
				err = errors.New("the signature brings certificates of others")
			}
			break
		}
	}
	if err != nil {
		return id, nil, refused("aws_iid: document: %v", err)
	}
	account, _ := d["accountId"].(string)
	instance, _ := d["instanceId"].(string)
	launched, _ := d["pendingTime"].(string)
	at, err := time.Parse(time.RFC3339, launched)
	now := v.now()
	switch {
	case err != nil:
		return id, nil, refused("aws_iid: document: pendingTime is missing or no time")
	case !slices.Contains(v.cfg.Accounts, account):
		return id, nil, refused("aws_iid: the account is not configured")
	case !awsInstance.MatchString(instance):
		return id, nil, refused("aws_iid: document: instanceId is missing or malformed")
	case at.After(now.Add(jose.Skew)):
		return id, nil, refused("aws_iid: the instance was launched in the future: check both clocks")
	}
	if id, err = spiffeid.FromSegments(v.td, "spire", "agent", AWSIID, account, region, instance); err != nil {
		return id, nil, refused("aws_iid: the instance cannot be part of an agent's ID")
	}
	if now.Sub(at) > v.cfg.MaxAge {
		return id, nil, refused("aws_iid: the instance was launched more than %s ago", v.cfg.MaxAge)
	}
	return id, awsSelectors(d), claimMachine(ctx, v.seen, id, keyHash)
}

func parseAWSPayload(payload []byte) ([]byte, *signedData, error) {
	o, err := jose.ParseObject(payload)
	if err == nil {
		err = o.Only("document", "signature", "rsa2048")
	}
	if err != nil {
		return nil, nil, err
	}
	doc, err := o.Text("document")
	if err != nil {
		return nil, nil, err
	}
	text, err := o.Text("rsa2048")
	if err != nil {
		return nil, nil, err
	}
	// AWS breaks the lines of the signature.
	ber, err := jose.Decode64(base64.StdEncoding, strings.ReplaceAll(text, "\n", ""))
	if err != nil {
		return nil, nil, fmt.Errorf("rsa2048: %w", err)
	}
	sig, err := parseSignedData(ber)
	if err != nil {
		return nil, nil, fmt.Errorf("rsa2048: %w", err)
	}
	return []byte(doc), sig, nil
}

func awsSelectors(d jose.Object) []mesh.Selector {
	var out []mesh.Selector
	for _, s := range [][2]string{
		{"account", "accountId"}, {"region", "region"}, {"az", "availabilityZone"}, {"image:id", "imageId"},
		{"instance:id", "instanceId"}, {"instance:type", "instanceType"},
	} {
		if v, _ := d[s[1]].(string); v != "" {
			out = append(out, mesh.Selector{Type: AWSIID, Value: s[0] + ":" + v})
		}
	}
	return out
}

// awsEvidence is the node's side: the metadata service, version 2.
type awsEvidence struct {
	base   string
	client *http.Client
}

func (awsEvidence) Kind() string { return AWSIID }

func (awsEvidence) Answer([]byte) ([]byte, error) { return nil, errNoChallenge }

func (e awsEvidence) Payload(ctx context.Context) ([]byte, error) {
	token, err := askMetadata(ctx, e.client, http.MethodPut, e.base+"/latest/api/token", "X-aws-ec2-metadata-token-ttl-seconds", "60")
	if err != nil {
		return nil, err
	}
	out := map[string]string{}
	for _, name := range []string{"document", "signature", "rsa2048"} {
		b, err := askMetadata(ctx, e.client, http.MethodGet, e.base+"/latest/dynamic/instance-identity/"+name, "X-aws-ec2-metadata-token", string(token))
		if err != nil {
			return nil, err
		}
		out[name] = string(b)
	}
	return json.Marshal(out)
}

// metadataClient goes to the metadata service and nowhere else: through no
// proxy and after no redirect.
func metadataClient() *http.Client {
	return &http.Client{
		Timeout: fetchTimeout, Transport: &http.Transport{DisableKeepAlives: true},
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
	}
}

func askMetadata(ctx context.Context, c *http.Client, method, page, header, value string) ([]byte, error) {
	req, err := http.NewRequestWithContext(ctx, method, page, nil)
	if err != nil {
		return nil, errors.New("metadata_url is not a URL")
	}
	req.Header.Set(header, value)
	resp, err := c.Do(req)
	if err != nil {
		return nil, fmt.Errorf("ask the metadata service: %w", err)
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		return nil, &httpStatus{page: page, code: resp.StatusCode}
	}
	b, err := io.ReadAll(io.LimitReader(resp.Body, maxMetadata+1))
	if err != nil {
		return nil, fmt.Errorf("read %s: %w", page, err)
	}
	if len(b) > maxMetadata || len(bytes.TrimSpace(b)) == 0 {
		return nil, fmt.Errorf("%s gives nothing or more than %d bytes", page, maxMetadata)
	}
	return b, nil
}

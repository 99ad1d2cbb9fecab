package attest

import (
	"bytes"
	"cmp"
	"context"
	"crypto"
	"errors"
	"fmt"
	"net/http"
	"net/url"
	"regexp"
	"slices"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"sallyport/internal/mesh"
)

// GCPIIT is the name of the attestation by the instance identity token of
// Google Compute Engine.
const GCPIIT = "gcp_iit"

const (
	gcpMetadata = "http://metadata.google.internal"
	gcpIssuer   = "https://accounts.google.com"
	// gcpAudience is what agents ask their token for, as SPIRE's.
	gcpAudience = "spire-gcp-node-attestor"
)

var gcpInstance = regexp.MustCompile(`^[0-9]{1,20}$`)

// GCPIITConfig says which instances admit a node.
type GCPIITConfig struct {
	// Projects that instances belong to, by ID. Required.
	Projects []string `yaml:"projects"`
	// JWKSFile holds Google's keys. Without it they are fetched as Google's
	// discovery document says.
	JWKSFile string `yaml:"jwks_file"`
}

func (c *GCPIITConfig) validate(field string) []error {
	if len(c.Projects) == 0 || slices.Contains(c.Projects, "") {
		return []error{fmt.Errorf("%s.projects: missing or empty; write the IDs of your projects, or anybody's instances could join", field)}
	}
	return nil
}

// NewGCPIIT verifies instance identity tokens in the full format. The payload
// is the token, as with SPIRE. Any program on an instance may ask for one, so
// an instance counts for the first key that shows its token, for ever. Agents
// are named spiffe://TD/spire/agent/gcp_iit/PROJECT/INSTANCE.
func NewGCPIIT(td spiffeid.TrustDomain, c GCPIITConfig, seen Seen) (NodeVerifier, error) {
	v := &gcpIIT{td: td, cfg: c, seen: seen, now: time.Now}
	var err error
	if v.keys, err = newKeySource(gcpIssuer, c.JWKSFile, "", "", func() time.Time { return v.now() }); err != nil {
		return nil, fmt.Errorf("gcp_iit: %w", err)
	}
	return v, nil
}

type gcpIIT struct {
	td   spiffeid.TrustDomain
	cfg  GCPIITConfig
	seen Seen
	now  func() time.Time
	keys keySource
}

func (v *gcpIIT) Verify(ctx context.Context, payload []byte, key crypto.PublicKey) (spiffeid.ID, []mesh.Selector, error) {
	id, sel, err := v.verify(ctx, payload, key)
	if err != nil {
		return spiffeid.ID{}, nil, err
	}
	return id, sel, nil
}

func (v *gcpIIT) verify(ctx context.Context, payload []byte, key crypto.PublicKey) (id spiffeid.ID, sel []mesh.Selector, err error) {
	keyHash, err := begin(ctx, GCPIIT, payload, key)
	if err != nil {
		return id, nil, err
	}
	t, err := tokens.Parse(string(payload))
	if err != nil {
		return id, nil, refused("gcp_iit: %v", err)
	}
	if err := verifyToken(ctx, t, v.keys); err != nil {
		return id, nil, fmt.Errorf("gcp_iit: %w", err)
	}
	if _, err := checkClaims(t, gcpIssuer, gcpAudience, v.now()); err != nil {
		return id, nil, fmt.Errorf("gcp_iit: %w", err)
	}
	e := t.Claims.Child("google").Child("compute_engine")
	project, _ := e["project_id"].(string)
	instance, _ := e["instance_id"].(string)
	switch {
	case len(e) == 0:
		return id, nil, refused("gcp_iit: token tells no instance: ask for format=full")
	case !slices.Contains(v.cfg.Projects, project):
		return id, nil, refused("gcp_iit: the project is not configured")
	case !gcpInstance.MatchString(instance):
		return id, nil, refused("gcp_iit: instance_id is missing or malformed")
	}
	// A project of the old kind is "domain.example:name".
	if id, err = spiffeid.FromSegments(v.td, "spire", "agent", GCPIIT, project, instance); err != nil {
		return id, nil, refused("gcp_iit: the project cannot be part of an agent's ID")
	}
	for _, s := range [][2]string{{"project-id", "project_id"}, {"zone", "zone"}, {"instance-name", "instance_name"}} {
		if value, _ := e[s[1]].(string); value != "" {
			sel = append(sel, mesh.Selector{Type: GCPIIT, Value: s[0] + ":" + value})
		}
	}
	return id, sel, claimMachine(ctx, v.seen, id, keyHash)
}

// gcpEvidence is the node's side: the metadata server.
type gcpEvidence struct {
	base    string
	account string
	client  *http.Client
}

func newGCPEvidence(c NodeConfig) Evidence {
	return gcpEvidence{base: cmp.Or(c.MetadataURL, gcpMetadata), account: cmp.Or(c.ServiceAccount, "default"), client: metadataClient()}
}

func (gcpEvidence) Kind() string { return GCPIIT }

func (gcpEvidence) Answer([]byte) ([]byte, error) { return nil, errNoChallenge }

func (e gcpEvidence) Payload(ctx context.Context) ([]byte, error) {
	q := url.Values{"audience": {gcpAudience}, "format": {"full"}}
	b, err := askMetadata(ctx, e.client, http.MethodGet,
		e.base+"/computeMetadata/v1/instance/service-accounts/"+url.PathEscape(e.account)+"/identity?"+q.Encode(), "Metadata-Flavor", "Google")
	if err != nil {
		return nil, err
	}
	b = bytes.TrimSpace(b)
	if bytes.Count(b, []byte{'.'}) != 2 {
		return nil, errors.New("the metadata server gives no token")
	}
	return b, nil
}

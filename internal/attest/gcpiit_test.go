package attest

import (
	"net/http"
	"net/http/httptest"
	"slices"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"sallyport/internal/attest/attesttest"
	"sallyport/internal/mesh"
)

// gcpClaims are those of Google's manual.
func gcpClaims(change ...any) map[string]any {
	now := time.Now().Unix()
	return map[string]any{
		"iss": gcpIssuer, "iat": now - 5, "exp": now + 3595, "aud": gcpAudience, "sub": "107517467455664443765", "azp": "107517467455664443765",
		"email": "1234-compute@developer.gserviceaccount.com", "email_verified": true,
		"google": map[string]any{"compute_engine": with(map[string]any{
			"project_id": "my-project", "project_number": 739419398126, "zone": "us-west1-a", "instance_id": "152986662232938449",
			"instance_name": "example", "instance_creation_timestamp": now - 1000, "instance_confidentiality": 0,
		}, change...)},
	}
}

func newGCP(t testing.TB, s signer) NodeVerifier {
	t.Helper()
	c := GCPIITConfig{Projects: []string{"my-project"}, JWKSFile: writeFile(t, s.jwks())}
	if errs := c.validate("gcp_iit"); len(errs) > 0 {
		t.Fatal(errs)
	}
	v, err := NewGCPIIT(td, c, &memSeen{})
	if err != nil {
		t.Fatal(err)
	}
	return v
}

func TestGCPIIT(t *testing.T) {
	s, other := newSigner(t, "RS256"), newSigner(t, "RS256")
	attesttest.Run(t, func(t *testing.T) attesttest.Fixture {
		now := time.Now().Unix()
		say := func(change ...any) []byte { return []byte(s.sign(with(gcpClaims(), change...))) }
		on := func(change ...any) []byte { return []byte(s.sign(gcpClaims(change...))) }
		return attesttest.Fixture{
			Verifier: newGCP(t, s), SingleUse: true, Good: on(),
			Agent:   spiffeid.RequireFromString("spiffe://example.org/spire/agent/gcp_iit/my-project/152986662232938449"),
			Stale:   [][]byte{say("exp", now-31), say("exp", nil), say("iat", now+60), say("iat", nil), say("nbf", now+60)},
			Foreign: [][]byte{[]byte(other.sign(gcpClaims())), say("iss", "https://accounts.example"), say("aud", "vault"), on("project_id", "your-project"), on("project_id", nil)},
			Forged: [][]byte{
				say("google", nil), say("google", map[string]any{}), on("instance_id", nil), on("instance_id", "../../server"), on("instance_id", 152986662232938449),
				[]byte(s.raw(`{"alg":"none","kid":"key-1"}`, string(jsonOf(t, gcpClaims())))), oidcPayload(t, s.sign(gcpClaims())),
			},
		}
	})
	v := newGCP(t, s)
	key := attesttest.Key(t)
	_, sel, err := v.Verify(t.Context(), []byte(s.sign(gcpClaims())), key)
	want := []mesh.Selector{{Type: GCPIIT, Value: "project-id:my-project"}, {Type: GCPIIT, Value: "zone:us-west1-a"}, {Type: GCPIIT, Value: "instance-name:example"}}
	if err != nil || !slices.Equal(sel, want) {
		t.Errorf("selectors %v, %v; want %v", sel, err, want)
	}
	fresh := []byte(s.sign(with(gcpClaims(), "azp", "x")))
	if _, _, err := v.Verify(t.Context(), fresh, attesttest.Key(t)); err == nil {
		t.Error("another program on the instance became the agent")
	}
	if _, _, err := v.Verify(t.Context(), fresh, key); err != nil {
		t.Errorf("the node attests again: %v", err)
	}
}

func TestAnInstanceOfGoogleAsksItsMetadata(t *testing.T) {
	srv := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.Header.Get("Metadata-Flavor") != "Google" || r.URL.Path != "/computeMetadata/v1/instance/service-accounts/default/identity" || r.URL.RawQuery != "audience=spire-gcp-node-attestor&format=full" {
			w.WriteHeader(http.StatusForbidden)
			return
		}
		w.Write([]byte("a.b.c"))
	}))
	defer srv.Close()
	e, err := NewEvidence(NodeConfig{Kind: GCPIIT, MetadataURL: srv.URL})
	if err != nil {
		t.Fatal(err)
	}
	if got, err := e.Payload(t.Context()); err != nil || string(got) != "a.b.c" {
		t.Errorf("payload %s, %v", got, err)
	}
	if e, err = NewEvidence(NodeConfig{Kind: GCPIIT, MetadataURL: srv.URL, ServiceAccount: "other"}); err != nil {
		t.Fatal(err)
	}
	if got, err := e.Payload(t.Context()); err == nil {
		t.Errorf("a refusal gave %s", got)
	}
}

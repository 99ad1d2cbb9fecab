package attest

import (
	"encoding/json"
	"errors"
	"net/http"
	"net/http/httptest"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"sallyport/internal/attest/attesttest"
	"sallyport/internal/jose"
	"sallyport/internal/mesh"
)

const (
	clusterIssuer = "https://kubernetes.default.svc.cluster.local"
	psatPod       = "6bb01b1d-0f3b-4b3c-8c5e-1a0c8f3c1b11"
	psatNode      = "0a1b5c5e-76c2-4a55-9f4d-5a6b3c2d1e0f"
)

// psatClaims are those of a projected token since Kubernetes 1.30.
func psatClaims() map[string]any {
	now := time.Now().Unix()
	return map[string]any{
		"aud": []string{"spire-server"}, "exp": now + 7200, "iat": now - 5, "nbf": now - 5, "iss": clusterIssuer, "jti": "a3b1",
		"kubernetes.io": map[string]any{
			"namespace": "spire", "node": map[string]any{"name": "worker-1", "uid": psatNode},
			"pod": map[string]any{"name": "spire-agent-x7k2p", "uid": psatPod}, "serviceaccount": map[string]any{"name": "spire-agent", "uid": "9f8e"},
		},
		"sub": "system:serviceaccount:spire:spire-agent",
	}
}

// bound is psatClaims with the kubernetes.io claim changed.
func bound(change ...any) map[string]any {
	c := psatClaims()
	c["kubernetes.io"] = with(c["kubernetes.io"].(map[string]any), change...)
	return c
}

func psatPayload(t testing.TB, cluster, token string) []byte {
	return jsonOf(t, map[string]string{"cluster": cluster, "token": token})
}

func newPSAT(t testing.TB, k K8sCluster) NodeVerifier {
	t.Helper()
	k.Issuer, k.ServiceAccounts = clusterIssuer, []string{"spire:spire-agent"}
	c := K8sPSATConfig{Clusters: map[string]K8sCluster{"blue": k}}
	if errs := c.validate("k8s_psat"); len(errs) > 0 {
		t.Fatal(errs)
	}
	v, err := NewK8sPSAT(td, c, &memSeen{})
	if err != nil {
		t.Fatal(err)
	}
	return v
}

// psatFixture are the same for both ways to verify.
func psatFixture(t *testing.T, s, other signer, v NodeVerifier) attesttest.Fixture {
	now := time.Now().Unix()
	say := func(change ...any) []byte { return psatPayload(t, "blue", s.sign(with(psatClaims(), change...))) }
	tie := func(change ...any) []byte { return psatPayload(t, "blue", s.sign(bound(change...))) }
	return attesttest.Fixture{
		Verifier: v, SingleUse: true, Good: say(),
		Agent: spiffeid.RequireFromString("spiffe://example.org/spire/agent/k8s_psat/blue/" + psatNode),
		Stale: [][]byte{say("exp", now-31), say("exp", nil), say("iat", nil), say("nbf", now+60), say("iat", now+60), say("exp", now+365*86400)},
		Foreign: [][]byte{
			psatPayload(t, "green", s.sign(psatClaims())), psatPayload(t, "", s.sign(psatClaims())),
			psatPayload(t, "blue", other.sign(psatClaims())),
			say("iss", "https://green.example"), say("aud", []string{"vault"}), say("aud", nil),
			say("sub", "system:serviceaccount:spire:other"), say("sub", nil),
			tie("namespace", "kube-system"), tie("serviceaccount", map[string]any{"name": "default"}),
		},
		Forged: [][]byte{
			tie("pod", nil), tie("pod", map[string]any{"name": "spire-agent-x7k2p"}), tie("pod", "x"), tie("namespace", nil), tie("serviceaccount", nil),
			say("kubernetes.io", nil), say("kubernetes.io", []any{}), tie("node", map[string]any{"name": "worker-1", "uid": "../../../server"}),
			[]byte(s.sign(psatClaims())), psatPayload(t, "blue", ""), psatPayload(t, "blue", "a.b.c"),
			jsonOf(t, map[string]string{"cluster": "blue", "token": s.sign(psatClaims()), "node": "x"}),
			psatPayload(t, "blue", s.raw(`{"alg":"none","kid":"key-1"}`, string(jsonOf(t, psatClaims())))),
		},
	}
}

func TestK8sPSATOffline(t *testing.T) {
	s, other := newSigner(t, "RS256"), newSigner(t, "RS256")
	attesttest.Run(t, func(t *testing.T) attesttest.Fixture {
		return psatFixture(t, s, other, newPSAT(t, K8sCluster{JWKSFile: writeFile(t, s.jwks())}))
	})
	v := newPSAT(t, K8sCluster{JWKSFile: writeFile(t, s.jwks())})
	id, _, err := v.Verify(t.Context(), psatPayload(t, "blue", s.sign(bound("node", nil))), attesttest.Key(t))
	if err != nil || id.Path() != "/spire/agent/k8s_psat/blue/"+psatPod {
		t.Errorf("a token that does not tell its node: %s, %v; want the pod's UID", id, err)
	}
}

// apiServer is the part of Kubernetes that reviews tokens.
type apiServer struct {
	t      testing.TB
	signer signer
	mu     sync.Mutex // guards the fields below
	review func(status map[string]any)
	pod    func(pod map[string]any)
	none   bool // no pod
	down   bool
}

func (a *apiServer) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.down || r.Header.Get("Authorization") != "Bearer of-the-issuer" {
		w.WriteHeader(http.StatusUnauthorized)
		return
	}
	switch r.Method + " " + r.URL.Path {
	case "POST /apis/authentication.k8s.io/v1/tokenreviews":
		var q struct {
			APIVersion, Kind string
			Spec             struct {
				Token     string
				Audiences []string
			}
		}
		if err := json.NewDecoder(r.Body).Decode(&q); err != nil || q.Kind != "TokenReview" || q.APIVersion != "authentication.k8s.io/v1" {
			a.t.Errorf("review %+v, %v", q, err)
		}
		status := map[string]any{"authenticated": false, "error": "invalid bearer token"}
		if tok, err := tokens.Parse(q.Spec.Token); err == nil && tok.Verify(jose.Key{Public: a.signer.key.Public()}) == nil {
			k := tok.Claims.Child("kubernetes.io")
			status = map[string]any{
				"authenticated": true, "audiences": q.Spec.Audiences,
				"user": map[string]any{
					"username": tok.Claims["sub"], "uid": "9f8e", "groups": []string{"system:serviceaccounts", "system:serviceaccounts:spire", "system:authenticated"},
					"extra": map[string]any{"authentication.kubernetes.io/pod-name": []any{k.Child("pod")["name"]}, "authentication.kubernetes.io/pod-uid": []any{k.Child("pod")["uid"]}},
				},
			}
		}
		if a.review != nil {
			a.review(status)
		}
		w.WriteHeader(http.StatusCreated)
		jsonTo(w, map[string]any{"kind": "TokenReview", "apiVersion": "authentication.k8s.io/v1", "status": status})
	case "GET /api/v1/namespaces/spire/pods/spire-agent-x7k2p":
		if a.none {
			http.NotFound(w, r)
			return
		}
		pod := map[string]any{
			"kind": "Pod", "metadata": map[string]any{"name": "spire-agent-x7k2p", "uid": psatPod},
			"spec": map[string]any{"nodeName": "worker-1"}, "status": map[string]any{"hostIP": "172.18.0.2"},
		}
		if a.pod != nil {
			a.pod(pod)
		}
		jsonTo(w, pod)
	case "GET /api/v1/nodes/worker-1":
		jsonTo(w, map[string]any{"kind": "Node", "metadata": map[string]any{"name": "worker-1", "uid": psatNode}})
	default:
		http.NotFound(w, r)
	}
}

func TestK8sPSATByReview(t *testing.T) {
	s, other := newSigner(t, "RS256"), newSigner(t, "RS256")
	a := &apiServer{t: t, signer: s}
	srv := httptest.NewTLSServer(a)
	defer srv.Close()
	k := K8sCluster{APIServer: srv.URL, CAFile: pemFile(t, srv.Certificate()), TokenFile: writeFile(t, []byte("of-the-issuer\n"))}
	attesttest.Run(t, func(t *testing.T) attesttest.Fixture { return psatFixture(t, s, other, newPSAT(t, k)) })

	good := psatPayload(t, "blue", s.sign(psatClaims()))
	_, sel, err := newPSAT(t, k).Verify(t.Context(), good, attesttest.Key(t))
	for _, want := range []string{"cluster:blue", "agent_ns:spire", "agent_sa:spire-agent", "agent_pod_name:spire-agent-x7k2p", "agent_pod_uid:" + psatPod, "agent_node_ip:172.18.0.2", "agent_node_name:worker-1", "agent_node_uid:" + psatNode} {
		if err != nil || !slices.Contains(sel, mesh.Selector{Type: "k8s_psat", Value: want}) {
			t.Errorf("no selector %s in %v, %v", want, sel, err)
		}
	}
	user := func(st map[string]any) map[string]any { return st["user"].(map[string]any) }
	for name, tt := range map[string]struct {
		change  *apiServer
		refusal bool
	}{
		"not authenticated":   {&apiServer{review: func(st map[string]any) { st["authenticated"] = false }}, true},
		"as a text":           {&apiServer{review: func(st map[string]any) { st["authenticated"] = "true" }}, true},
		"no status":           {&apiServer{review: func(st map[string]any) { clear(st) }}, true},
		"another audience":    {&apiServer{review: func(st map[string]any) { st["audiences"] = []string{"api"} }}, true},
		"no audience":         {&apiServer{review: func(st map[string]any) { delete(st, "audiences") }}, true},
		"another account":     {&apiServer{review: func(st map[string]any) { user(st)["username"] = "system:admin" }}, true},
		"another pod":         {&apiServer{review: func(st map[string]any) { user(st)["extra"] = map[string]any{} }}, true},
		"the pod is gone":     {&apiServer{none: true}, true},
		"the pod is new":      {&apiServer{pod: func(p map[string]any) { p["metadata"] = map[string]any{"uid": "other"} }}, true},
		"the pod moved":       {&apiServer{pod: func(p map[string]any) { p["spec"] = map[string]any{"nodeName": "worker-2"} }}, true},
		"the pod has no node": {&apiServer{pod: func(p map[string]any) { delete(p, "spec") }}, true},
		"no answer":           {&apiServer{down: true}, false},
	} {
		a.mu.Lock()
		a.review, a.pod, a.none, a.down = tt.change.review, tt.change.pod, tt.change.none, tt.change.down
		a.mu.Unlock()
		if _, _, err := newPSAT(t, k).Verify(t.Context(), good, attesttest.Key(t)); err == nil || errors.Is(err, ErrEvidence) != tt.refusal {
			t.Errorf("%s: %v, want a refusal: %t", name, err, tt.refusal)
		}
	}
}

func FuzzK8sPSAT(f *testing.F) {
	s := newSigner(f, "ES256")
	v := newPSAT(f, K8sCluster{JWKSFile: writeFile(f, s.jwks())})
	f.Add(psatPayload(f, "blue", "a.b.c"))
	f.Add([]byte(`{"cluster":"blue"}`))
	key := attesttest.Key(f)
	f.Fuzz(func(t *testing.T, payload []byte) {
		if id, _, err := v.Verify(t.Context(), payload, key); err == nil {
			t.Errorf("accepted as %s", id)
		}
		if o, err := jose.ParseObject(payload); err == nil {
			_, _ = (&k8sCluster{}).pod(o)
		}
	})
}

package attest

import (
	"bytes"
	"cmp"
	"context"
	"crypto"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"net/http"
	"net/url"
	"slices"
	"strings"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"sallyport/internal/jose"
	"sallyport/internal/mesh"
)

// K8sPSAT is the name of the attestation by a projected service account token
// of Kubernetes.
const K8sPSAT = "k8s_psat"

// psatAudience is what agents ask their token for, as SPIRE's.
const psatAudience = "spire-server"

// K8sPSATConfig says which pods of which clusters admit a node.
type K8sPSATConfig struct {
	// Clusters by the name that nodes say. Required.
	Clusters map[string]K8sCluster `yaml:"clusters"`
}

// K8sCluster says which tokens of one cluster admit a node, and how they are
// verified: offline by the cluster's keys, or by asking its API server, which
// knows of pods that are gone as well.
type K8sCluster struct {
	// Issuer is what the token's iss says, as the API server's
	// --service-account-issuer. Required.
	Issuer string `yaml:"issuer"`
	// Audience must be in the token's aud. Default "spire-server".
	Audience string `yaml:"audience"`
	// ServiceAccounts that agents run as, each namespace:name. Required.
	ServiceAccounts []string `yaml:"service_accounts"`
	// JWKSFile holds the cluster's keys, as kubectl get --raw
	// /openid/v1/jwks prints them. JWKSURL is a page with them.
	JWKSFile string `yaml:"jwks_file"`
	JWKSURL  string `yaml:"jwks_url"`
	// APIServer is the https URL of the API server, which is asked to review
	// each token. TokenFile holds the token that the issuer shows to it, with
	// the rights to create tokenreviews and to get pods and nodes.
	APIServer string `yaml:"api_server"`
	TokenFile string `yaml:"token_file"`
	// CAFile is a PEM file with the roots for JWKSURL or APIServer, instead of
	// the system's.
	CAFile string `yaml:"ca_file"`
}

func (c *K8sPSATConfig) validate(field string) []error {
	var errs []error
	if len(c.Clusters) == 0 {
		errs = append(errs, fmt.Errorf("%s.clusters: missing; write at least one", field))
	}
	for _, name := range slices.Sorted(maps.Keys(c.Clusters)) {
		k, f := c.Clusters[name], field+".clusters."+name
		need := func(ok bool, name, what string) {
			if !ok {
				errs = append(errs, fmt.Errorf("%s.%s: %s", f, name, what))
			}
		}
		if err := spiffeid.ValidatePathSegment(name); err != nil {
			errs = append(errs, fmt.Errorf("%s: %q cannot be part of an agent's ID: use letters, digits, and . - _", f, name))
		}
		need(k.Issuer != "", "issuer", `missing; write the cluster's --service-account-issuer, such as "https://kubernetes.default.svc.cluster.local"`)
		need(len(k.ServiceAccounts) > 0, "service_accounts", `missing; write namespace:name of the account that agents run as, such as "spire:spire-agent"`)
		for i, a := range k.ServiceAccounts {
			ns, sa, ok := strings.Cut(a, ":")
			need(ok && ns != "" && sa != "" && !strings.Contains(sa, ":"), fmt.Sprintf("service_accounts[%d]", i), fmt.Sprintf("%q is not namespace:name", a))
		}
		ways := 0
		for _, w := range []string{k.JWKSFile, k.JWKSURL, k.APIServer} {
			if w != "" {
				ways++
			}
		}
		need(ways == 1, "jwks_file", "write one of jwks_file, jwks_url and api_server")
		need(k.JWKSURL == "" || checkHTTPS(k.JWKSURL) == nil, "jwks_url", "is not an https URL")
		need(k.APIServer == "" || checkHTTPS(k.APIServer) == nil, "api_server", "is not an https URL")
		need((k.APIServer == "") == (k.TokenFile == ""), "token_file", "belongs to api_server: write both or neither")
	}
	return errs
}

// NewK8sPSAT verifies projected service account tokens. The payload is SPIRE's:
// {"cluster": "...", "token": "..."}. A token counts for the first key that
// shows it. Agents are named spiffe://TD/spire/agent/k8s_psat/CLUSTER/UID,
// where UID is that of the node, or of the pod when the token does not tell
// the node.
func NewK8sPSAT(td spiffeid.TrustDomain, c K8sPSATConfig, seen Seen) (NodeVerifier, error) {
	v := &k8sPSAT{td: td, seen: seen, now: time.Now, clusters: map[string]*k8sCluster{}}
	for name, k := range c.Clusters {
		k.Audience = cmp.Or(k.Audience, psatAudience)
		cluster := &k8sCluster{K8sCluster: k, name: name}
		var err error
		if k.APIServer != "" {
			cluster.client, err = httpsClient(k.CAFile)
		} else {
			cluster.keys, err = newKeySource(k.Issuer, k.JWKSFile, k.JWKSURL, k.CAFile, func() time.Time { return v.now() })
		}
		if err != nil {
			return nil, fmt.Errorf("k8s_psat cluster %s: %w", name, err)
		}
		v.clusters[name] = cluster
	}
	return v, nil
}

type k8sPSAT struct {
	td       spiffeid.TrustDomain
	seen     Seen
	now      func() time.Time
	clusters map[string]*k8sCluster
}

type k8sCluster struct {
	K8sCluster
	name   string
	keys   keySource    // nil when the API server is asked
	client *http.Client // nil when it is not
}

// A podIdentity is whose token it is.
type podIdentity struct {
	namespace, account   string
	podName, podUID      string
	nodeName, nodeUID    string
	nodeAddress, subject string
}

func (v *k8sPSAT) Verify(ctx context.Context, payload []byte, key crypto.PublicKey) (spiffeid.ID, []mesh.Selector, error) {
	id, sel, err := v.verify(ctx, payload, key)
	if err != nil {
		return spiffeid.ID{}, nil, err
	}
	return id, sel, nil
}

func (v *k8sPSAT) verify(ctx context.Context, payload []byte, key crypto.PublicKey) (id spiffeid.ID, sel []mesh.Selector, err error) {
	keyHash, err := begin(ctx, K8sPSAT, payload, key)
	if err != nil {
		return id, nil, err
	}
	o, err := jose.ParseObject(payload)
	if err == nil {
		err = o.Only("cluster", "token")
	}
	if err != nil {
		return id, nil, refused("k8s_psat: %v", err)
	}
	name, _ := o["cluster"].(string)
	c := v.clusters[name]
	if c == nil {
		return id, nil, refused("k8s_psat: the cluster is not configured")
	}
	text, _ := o["token"].(string)
	t, err := tokens.Parse(text)
	if err != nil {
		return id, nil, refused("k8s_psat: %v", err)
	}
	if c.keys != nil {
		if err := verifyToken(ctx, t, c.keys); err != nil {
			return id, nil, fmt.Errorf("k8s_psat cluster %s: %w", c.name, err)
		}
	}
	until, err := checkClaims(t, c.Issuer, c.Audience, v.now())
	if err != nil {
		return id, nil, fmt.Errorf("k8s_psat cluster %s: %w", c.name, err)
	}
	who, err := c.pod(t.Claims)
	if err != nil {
		return id, nil, refused("k8s_psat cluster %s: %v", c.name, err)
	}
	if c.client != nil {
		if err := c.review(ctx, text, &who); err != nil {
			return id, nil, fmt.Errorf("k8s_psat cluster %s: %w", c.name, err)
		}
	}
	id, err = spiffeid.FromSegments(v.td, "spire", "agent", K8sPSAT, c.name, cmp.Or(who.nodeUID, who.podUID))
	if err != nil {
		return id, nil, refused("k8s_psat cluster %s: the UID cannot be part of an agent's ID", c.name)
	}
	return id, c.selectors(who), claimToken(ctx, v.seen, t, keyHash, until)
}

// pod reads who the token is bound to, and refuses one that is bound to no
// pod: it would outlive what it was given to.
func (c *k8sCluster) pod(claims jose.Object) (podIdentity, error) {
	k := claims.Child("kubernetes.io")
	p := podIdentity{}
	p.namespace, _ = k["namespace"].(string)
	p.account, _ = k.Child("serviceaccount")["name"].(string)
	p.podName, _ = k.Child("pod")["name"].(string)
	p.podUID, _ = k.Child("pod")["uid"].(string)
	p.nodeName, _ = k.Child("node")["name"].(string)
	p.nodeUID, _ = k.Child("node")["uid"].(string)
	p.subject = "system:serviceaccount:" + p.namespace + ":" + p.account
	switch {
	case p.namespace == "" || p.account == "":
		return p, errors.New("token names no namespace and service account")
	case claims["sub"] != p.subject:
		return p, errors.New("token: sub is not its service account")
	case p.podName == "" || p.podUID == "":
		return p, errors.New("token is bound to no pod")
	case !slices.Contains(c.ServiceAccounts, p.namespace+":"+p.account):
		return p, errors.New("the service account is not one of those that agents run as")
	}
	return p, nil
}

func (c *k8sCluster) selectors(p podIdentity) []mesh.Selector {
	out := []mesh.Selector{{Type: K8sPSAT, Value: "cluster:" + c.name}}
	for _, s := range [][2]string{
		{"agent_ns", p.namespace}, {"agent_sa", p.account}, {"agent_pod_name", p.podName}, {"agent_pod_uid", p.podUID},
		{"agent_node_ip", p.nodeAddress}, {"agent_node_name", p.nodeName}, {"agent_node_uid", p.nodeUID},
	} {
		if s[1] != "" {
			out = append(out, mesh.Selector{Type: K8sPSAT, Value: s[0] + ":" + s[1]})
		}
	}
	return out
}

// review asks the API server whether the token is good and where its pod runs.
// What the token says of itself must be what the API server says.
func (c *k8sCluster) review(ctx context.Context, token string, p *podIdentity) error {
	body, err := json.Marshal(map[string]any{
		"apiVersion": "authentication.k8s.io/v1", "kind": "TokenReview",
		"spec": map[string]any{"token": token, "audiences": []string{c.Audience}},
	})
	if err != nil {
		return err
	}
	o, err := c.ask(ctx, http.MethodPost, "/apis/authentication.k8s.io/v1/tokenreviews", body)
	if err != nil {
		return fmt.Errorf("review the token: %w", err)
	}
	status := o.Child("status")
	user := status.Child("user")
	extra := func(name string) string {
		if v := claimTexts(user.Child("extra")["authentication.kubernetes.io/"+name]); len(v) == 1 {
			return v[0]
		}
		return ""
	}
	switch {
	case status["authenticated"] != true:
		return refused("the API server does not accept the token")
	case !slices.Contains(claimTexts(status["audiences"]), c.Audience):
		return refused("the API server does not accept the token for this audience")
	case user["username"] != p.subject || extra("pod-name") != p.podName || extra("pod-uid") != p.podUID:
		return refused("the API server says that the token is of another pod")
	}
	pod, err := c.ask(ctx, http.MethodGet, "/api/v1/namespaces/"+url.PathEscape(p.namespace)+"/pods/"+url.PathEscape(p.podName), nil)
	if err != nil {
		return fmt.Errorf("get the pod: %w", gone(err))
	}
	node, _ := pod.Child("spec")["nodeName"].(string)
	if pod.Child("metadata")["uid"] != p.podUID || node == "" || p.nodeName != "" && p.nodeName != node {
		return refused("the pod is gone, or runs on another node")
	}
	on, err := c.ask(ctx, http.MethodGet, "/api/v1/nodes/"+url.PathEscape(node), nil)
	if err != nil {
		return fmt.Errorf("get the node: %w", gone(err))
	}
	uid, _ := on.Child("metadata")["uid"].(string)
	if uid == "" || p.nodeUID != "" && p.nodeUID != uid {
		return refused("the node is another")
	}
	p.nodeName, p.nodeUID = node, uid
	p.nodeAddress, _ = pod.Child("status")["hostIP"].(string)
	return nil
}

// gone makes a refusal of an answer that there is no such thing.
func gone(err error) error {
	var s *httpStatus
	if errors.As(err, &s) && s.code == http.StatusNotFound {
		return refused("the API server does not know it")
	}
	return err
}

func (c *k8sCluster) ask(ctx context.Context, method, path string, body []byte) (jose.Object, error) {
	secret, err := readToken(c.TokenFile)
	if err != nil {
		return nil, err
	}
	req, err := http.NewRequestWithContext(ctx, method, c.APIServer+path, bytes.NewReader(body))
	if err != nil {
		return nil, err
	}
	b, err := fetch(c.client, req, map[string]string{"Authorization": "Bearer " + secret, "Accept": "application/json", "Content-Type": "application/json"})
	if err != nil {
		return nil, err
	}
	return jose.ParseObject(b)
}

// psatEvidence is the node's side: the token that the kubelet keeps fresh.
type psatEvidence struct{ cluster, file string }

func (psatEvidence) Kind() string { return K8sPSAT }

func (psatEvidence) Answer([]byte) ([]byte, error) { return nil, errNoChallenge }

func (e psatEvidence) Payload(context.Context) ([]byte, error) {
	t, err := readToken(e.file)
	if err != nil {
		return nil, err
	}
	return json.Marshal(map[string]string{"cluster": e.cluster, "token": t})
}

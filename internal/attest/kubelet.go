package attest

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/netip"
	"net/url"
	"slices"
	"strings"
	"sync"
	"time"

	"sallyport/internal/mesh"
)

const (
	// maxPods bounds the kubelet's list of pods, bytes: 250 pods of 100 KiB.
	maxPods = 32 << 20
	// keepPods is how long what the kubelet said of a container is believed:
	// labels may change.
	keepPods = 10 * time.Second
)

// KubeletConfig says how the kubelet of this node is asked about pods.
type KubeletConfig struct {
	// URL of the kubelet, such as https://127.0.0.1:10250. Plain http is taken
	// on loopback only: the read-only port. Without it the kubelet is not asked.
	URL string `yaml:"url"`
	// TokenFile holds the token that is shown to it: that of a service account
	// with the right to get nodes/proxy.
	TokenFile string `yaml:"token_file"`
	// CAFile is a PEM file with the roots of the kubelet's certificate, instead
	// of the system's.
	CAFile string `yaml:"ca_file"`
}

// Validate reports every mistake, by field.
func (c KubeletConfig) Validate() error {
	if c.URL == "" {
		if c.TokenFile != "" || c.CAFile != "" {
			return errors.New("workload.kubelet.url: missing beside token_file or ca_file")
		}
		return nil
	}
	if checkHTTPS(c.URL) == nil {
		return nil
	}
	u, err := url.Parse(c.URL)
	if err == nil && u.Scheme == "http" && c.TokenFile == "" && c.CAFile == "" {
		if a, err := netip.ParseAddr(u.Hostname()); err == nil && a.IsLoopback() {
			return nil
		}
	}
	return errors.New(`workload.kubelet.url: is neither https nor http on loopback without a token; write such as "https://127.0.0.1:10250"`)
}

// A Kubelet tells which pod a container of this node belongs to. It is safe
// for concurrent use and holds no goroutine.
type Kubelet struct {
	cfg    KubeletConfig
	client *http.Client
	now    func() time.Time

	mu    sync.Mutex // guards known
	known map[Container]podFacts
}

type podFacts struct {
	selectors []mesh.Selector
	at        time.Time
}

// NewKubelet contacts nobody yet.
func NewKubelet(c KubeletConfig) (*Kubelet, error) {
	if err := c.Validate(); err != nil {
		return nil, err
	}
	client, err := httpsClient(c.CAFile)
	if err != nil {
		return nil, fmt.Errorf("workload.kubelet: %w", err)
	}
	return &Kubelet{cfg: c, client: client, now: time.Now, known: map[Container]podFacts{}}, nil
}

// Selectors adds to have, as Gather gave it, what the kubelet knows of the
// container among it: k8s:ns, k8s:sa, k8s:pod-name, k8s:node-name,
// k8s:pod-label:KEY:VALUE, k8s:container-name and k8s:container-image. A
// process in no pod is left as it is.
func (k *Kubelet) Selectors(ctx context.Context, have []mesh.Selector) ([]mesh.Selector, error) {
	var c Container
	for _, s := range have {
		if s.Type == "k8s" {
			if v, ok := strings.CutPrefix(s.Value, "pod-uid:"); ok {
				c.PodUID = v
			} else if v, ok := strings.CutPrefix(s.Value, "container-id:"); ok {
				c.ID = v
			}
		}
	}
	if c.PodUID == "" || c.ID == "" {
		return have, nil
	}
	k.mu.Lock()
	facts, ok := k.known[c]
	k.mu.Unlock()
	now := k.now()
	if ok && now.Sub(facts.at) < keepPods && !now.Before(facts.at) {
		return append(slices.Clip(have), facts.selectors...), nil
	}
	list, err := k.pods(ctx)
	if err != nil {
		return nil, fmt.Errorf("ask the kubelet: %w", err)
	}
	sel, err := list.find(c)
	if err != nil {
		return nil, err
	}
	k.mu.Lock()
	defer k.mu.Unlock()
	for other, f := range k.known {
		if now.Sub(f.at) >= keepPods || now.Before(f.at) {
			delete(k.known, other)
		}
	}
	k.known[c] = podFacts{selectors: sel, at: now}
	return append(slices.Clip(have), sel...), nil
}

func (k *Kubelet) pods(ctx context.Context) (podList, error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, strings.TrimSuffix(k.cfg.URL, "/")+"/pods", nil)
	if err != nil {
		return podList{}, err
	}
	req.Header.Set("Accept", "application/json")
	if k.cfg.TokenFile != "" {
		t, err := readToken(k.cfg.TokenFile)
		if err != nil {
			return podList{}, err
		}
		req.Header.Set("Authorization", "Bearer "+t)
	}
	resp, err := k.client.Do(req)
	if err != nil {
		return podList{}, err
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		return podList{}, &httpStatus{page: req.URL.Redacted(), code: resp.StatusCode}
	}
	b, err := io.ReadAll(io.LimitReader(resp.Body, maxPods+1))
	if err != nil {
		return podList{}, err
	}
	if len(b) > maxPods {
		return podList{}, fmt.Errorf("its list of pods has more than %d bytes", maxPods)
	}
	return parsePods(b)
}

// A podList is the part of a v1 PodList that is of use.
type podList struct {
	Kind  string `json:"kind"`
	Items []pod  `json:"items"`
}

type pod struct {
	Metadata struct {
		Name        string            `json:"name"`
		Namespace   string            `json:"namespace"`
		UID         string            `json:"uid"`
		Labels      map[string]string `json:"labels"`
		Annotations map[string]string `json:"annotations"`
	} `json:"metadata"`
	Spec struct {
		ServiceAccount string `json:"serviceAccountName"`
		Node           string `json:"nodeName"`
	} `json:"spec"`
	Status struct {
		Containers []podContainer `json:"containerStatuses"`
		Init       []podContainer `json:"initContainerStatuses"`
		Ephemeral  []podContainer `json:"ephemeralContainerStatuses"`
	} `json:"status"`
}

type podContainer struct {
	Name  string `json:"name"`
	ID    string `json:"containerID"` // runtime://id
	Image string `json:"image"`
}

func parsePods(b []byte) (podList, error) {
	var l podList
	if err := json.Unmarshal(b, &l); err != nil {
		return podList{}, errors.New("the list of pods is malformed")
	}
	if l.Kind != "PodList" {
		return podList{}, errors.New("the answer is no list of pods")
	}
	return l, nil
}

// find gives the selectors of the pod and container, which must be known
// together and once.
func (l podList) find(c Container) ([]mesh.Selector, error) {
	var out []mesh.Selector
	for _, p := range l.Items {
		// The kubelet names the cgroup of a static pod by the hash of its file.
		if p.Metadata.UID != c.PodUID && p.Metadata.Annotations["kubernetes.io/config.hash"] != c.PodUID {
			continue
		}
		for _, k := range slices.Concat(p.Status.Containers, p.Status.Init, p.Status.Ephemeral) {
			if _, id, ok := strings.Cut(k.ID, "://"); !ok || id != c.ID {
				continue
			}
			if out != nil {
				return nil, fmt.Errorf("the kubelet knows container %.12s of pod %s twice", c.ID, c.PodUID)
			}
			out = p.selectors(k)
		}
	}
	if out == nil {
		return nil, fmt.Errorf("the kubelet does not know container %.12s of pod %s yet", c.ID, c.PodUID)
	}
	return out, nil
}

func (p pod) selectors(c podContainer) []mesh.Selector {
	out := []mesh.Selector{}
	add := func(value string) {
		// What has no valid form matches no entry.
		if s := (mesh.Selector{Type: "k8s", Value: value}); s.Check() == nil {
			out = append(out, s)
		}
	}
	add("ns:" + p.Metadata.Namespace)
	add("sa:" + p.Spec.ServiceAccount)
	add("pod-name:" + p.Metadata.Name)
	add("node-name:" + p.Spec.Node)
	add("container-name:" + c.Name)
	add("container-image:" + c.Image)
	for k, v := range p.Metadata.Labels {
		add("pod-label:" + k + ":" + v)
	}
	return out
}

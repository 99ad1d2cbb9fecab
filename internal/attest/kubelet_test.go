package attest

import (
	"net/http"
	"net/http/httptest"
	"slices"
	"strings"
	"testing"
	"time"

	"sallyport/internal/mesh"
)

// kubeletPods is what a kubelet prints, cut to one pod.
func kubeletPods(changes ...func(pod map[string]any)) map[string]any {
	p := map[string]any{
		"metadata": map[string]any{
			"name": "payment-6d4cf56db6-abcde", "namespace": "shop", "uid": uid, "generateName": "payment-6d4cf56db6-",
			"labels": map[string]any{"app.kubernetes.io/name": "payment", "tier": "", "odd label": "x"}, "annotations": map[string]any{"a": "b"},
		},
		"spec": map[string]any{"serviceAccountName": "payment", "nodeName": "worker-1", "containers": []any{map[string]any{"name": "app", "image": "registry.example/payment:1"}}},
		"status": map[string]any{"phase": "Running", "containerStatuses": []any{
			map[string]any{"name": "app", "image": "registry.example/payment:1", "imageID": "sha256:x", "containerID": "containerd://" + idA},
			map[string]any{"name": "starting"},
		}},
	}
	for _, f := range changes {
		f(p)
	}
	return map[string]any{"kind": "PodList", "apiVersion": "v1", "metadata": map[string]any{}, "items": []any{p}}
}

func inPod(path string) []mesh.Selector {
	return append([]mesh.Selector{{Type: "unix", Value: "uid:1000"}}, containerSelectors(path)...)
}

func TestKubelet(t *testing.T) {
	var list any
	hits := 0
	srv := httptest.NewTLSServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		hits++
		if r.URL.Path != "/pods" || r.Header.Get("Authorization") != "Bearer of-the-sidecar" {
			w.WriteHeader(http.StatusUnauthorized)
			return
		}
		jsonTo(w, list)
	}))
	defer srv.Close()
	now := time.Now()
	fresh := func() *Kubelet {
		k, err := NewKubelet(KubeletConfig{URL: srv.URL + "/", CAFile: pemFile(t, srv.Certificate()), TokenFile: writeFile(t, []byte("of-the-sidecar"))})
		if err != nil {
			t.Fatal(err)
		}
		k.now = func() time.Time { return now }
		return k
	}
	have := inPod("/kubepods/burstable/pod" + uid + "/" + idA)
	k := fresh()
	list = kubeletPods()
	for range 2 {
		got, err := k.Selectors(t.Context(), have)
		if err != nil {
			t.Fatal(err)
		}
		var text []string
		for _, s := range got[len(have):] {
			text = append(text, s.String())
		}
		slices.Sort(text)
		want := "k8s:container-image:registry.example/payment:1 k8s:container-name:app k8s:node-name:worker-1 k8s:ns:shop " +
			"k8s:pod-label:app.kubernetes.io/name:payment k8s:pod-label:tier: k8s:pod-name:payment-6d4cf56db6-abcde k8s:sa:payment"
		if strings.Join(text, " ") != want {
			t.Errorf("got  %s\nwant %s", strings.Join(text, " "), want)
		}
	}
	if hits != 1 {
		t.Errorf("asked %d times for one container", hits)
	}
	now = now.Add(keepPods)
	if _, err := k.Selectors(t.Context(), have); err != nil || hits != 2 {
		t.Errorf("later: %v, asked %d times", err, hits)
	}
	host := []mesh.Selector{{Type: "unix", Value: "uid:0"}}
	if got, err := fresh().Selectors(t.Context(), host); err != nil || !slices.Equal(got, host) || hits != 2 {
		t.Errorf("outside of a pod: %v, %v", got, err)
	}
	status := func(v any) func(map[string]any) { return func(p map[string]any) { p["status"] = v } }
	for name, l := range map[string]any{
		"another pod":       kubeletPods(func(p map[string]any) { p["metadata"].(map[string]any)["uid"] = idB[:32] }),
		"no container yet":  kubeletPods(status(map[string]any{})),
		"another container": kubeletPods(status(map[string]any{"containerStatuses": []any{map[string]any{"name": "app", "containerID": "containerd://" + idB}}})),
		"one twice":         kubeletPods(status(map[string]any{"containerStatuses": []any{map[string]any{"containerID": "a://" + idA}}, "ephemeralContainerStatuses": []any{map[string]any{"containerID": "a://" + idA}}})),
		"no list":           map[string]any{"kind": "Status", "status": "Failure"},
		"no JSON object":    "pods",
	} {
		list = l
		if got, err := fresh().Selectors(t.Context(), have); err == nil {
			t.Errorf("%s: %v", name, got)
		}
	}
	list = kubeletPods(func(p map[string]any) {
		m := p["metadata"].(map[string]any)
		m["uid"], m["annotations"] = "the-mirror", map[string]any{"kubernetes.io/config.hash": idB[:32]}
	})
	if _, err := fresh().Selectors(t.Context(), inPod("/kubepods/burstable/pod"+idB[:32]+"/"+idA)); err != nil {
		t.Errorf("a static pod: %v", err)
	}
	wrong := fresh()
	wrong.cfg.TokenFile = writeFile(t, []byte("of-another"))
	if _, err := wrong.Selectors(t.Context(), have); err == nil {
		t.Error("an error of the kubelet was no error")
	}
}

func TestKubeletConfig(t *testing.T) {
	for _, c := range []struct {
		name string
		c    KubeletConfig
		ok   bool
	}{
		{"none", KubeletConfig{}, true},
		{"https", KubeletConfig{URL: "https://worker-1:10250", TokenFile: "t", CAFile: "c"}, true},
		{"the read-only port", KubeletConfig{URL: "http://127.0.0.1:10255"}, true},
		{"a token in clear text", KubeletConfig{URL: "http://127.0.0.1:10255", TokenFile: "t"}, false},
		{"clear text on the network", KubeletConfig{URL: "http://10.0.0.1:10255"}, false},
		{"a token for nobody", KubeletConfig{TokenFile: "t"}, false},
		{"no URL", KubeletConfig{URL: "worker-1"}, false},
	} {
		if err := c.c.Validate(); (err == nil) != c.ok {
			t.Errorf("%s: %v", c.name, err)
		}
	}
}

func FuzzPodList(f *testing.F) {
	f.Add(jsonOf(f, kubeletPods()))
	f.Add([]byte(`{"kind":"PodList","items":[null,{}]}`))
	f.Fuzz(func(t *testing.T, b []byte) {
		l, err := parsePods(b)
		if err != nil {
			return
		}
		sel, err := l.find(Container{ID: idA, PodUID: uid})
		if (err == nil) != (sel != nil) {
			t.Errorf("%v, %v", sel, err)
		}
		for _, s := range sel {
			if err := s.Check(); err != nil {
				t.Error(err)
			}
		}
	})
}

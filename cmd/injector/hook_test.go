package main

import (
	"bytes"
	"encoding/json"
	"flag"
	"fmt"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

var update = flag.Bool("update", false, "write the golden files anew")

func testHook() *hook {
	c := &Config{Image: "sallyport:test"}
	c.fill()
	return &hook{cfg: c, log: slog.New(slog.DiscardHandler)}
}

// ask sends a pod as Kubernetes does.
func ask(t *testing.T, pod string) *response {
	t.Helper()
	body := fmt.Sprintf(`{"apiVersion":"admission.k8s.io/v1","kind":"AdmissionReview","request":{"uid":"u-1","kind":{"group":"","version":"v1","kind":"Pod"},"namespace":"shop","operation":"CREATE","object":%s}}`, pod)
	w := httptest.NewRecorder()
	testHook().ServeHTTP(w, httptest.NewRequest(http.MethodPost, "/mutate", strings.NewReader(body)))
	var out review
	if err := json.Unmarshal(w.Body.Bytes(), &out); err != nil || w.Code != http.StatusOK || out.Response == nil || out.Response.UID != "u-1" || out.Kind != "AdmissionReview" {
		t.Fatalf("%d %s: %v", w.Code, w.Body, err)
	}
	return out.Response
}

// TestPatch holds what is added to a pod to golden files, which the test of the
// manifests applies and reads as Kubernetes would.
func TestPatch(t *testing.T) {
	for name, pod := range map[string]string{
		"bare":   `{"metadata":{},"spec":{"containers":[{"name":"app"}]}}`,
		"serves": `{"metadata":{"annotations":{"sallyport/app":"127.0.0.1:8080"}},"spec":{"initContainers":[{"name":"migrate"}],"containers":[{"name":"app","env":[{"name":"A"}],"volumeMounts":[{"name":"v"}]},{"name":"log"}],"volumes":[{"name":"v"}]}}`,
	} {
		t.Run(name, func(t *testing.T) {
			got := ask(t, pod)
			if !got.Allowed || got.PatchType != "JSONPatch" {
				t.Fatalf("%+v", got)
			}
			var ops any
			if err := json.Unmarshal(got.Patch, &ops); err != nil {
				t.Fatal(err)
			}
			b, err := json.MarshalIndent(map[string]any{"pod": json.RawMessage(pod), "patch": ops}, "", "  ")
			if err != nil {
				t.Fatal(err)
			}
			file := filepath.Join("testdata", name+".golden.json")
			if *update {
				if err := os.WriteFile(file, append(b, '\n'), 0o600); err != nil {
					t.Fatal(err)
				}
			}
			want, err := os.ReadFile(file)
			if err != nil || !bytes.Equal(bytes.TrimSpace(want), b) {
				t.Errorf("%s is not what is added now (%v): %s", file, err, b)
			}
		})
	}
}

func TestPodsThatAreLeftAlone(t *testing.T) {
	for name, pod := range map[string]string{
		"one that has a sidecar": `{"spec":{"initContainers":[{"name":"sallyport-sidecar"}],"containers":[{"name":"app"}]}}`,
		"one that wants none":    `{"metadata":{"annotations":{"sallyport/inject":"false"}},"spec":{"hostNetwork":true,"containers":[{"name":"app"}]}}`,
	} {
		if got := ask(t, pod); !got.Allowed || got.Patch != nil {
			t.Errorf("%s: %+v", name, got)
		}
	}
}

func TestPodsThatAreRefused(t *testing.T) {
	for _, tt := range []struct{ name, pod, want string }{
		{"the network of the node", `{"spec":{"hostNetwork":true,"containers":[{"name":"app"}]}}`, "hostNetwork"},
		{"processes apart", `{"spec":{"shareProcessNamespace":false,"containers":[{"name":"app"}]}}`, "shareProcessNamespace"},
		{"the sidecar's user, of the pod", `{"spec":{"securityContext":{"runAsUser":1337},"containers":[{"name":"app"}]}}`, "runAsUser 1337"},
		{"the sidecar's user, of a container", `{"spec":{"containers":[{"name":"app","securityContext":{"runAsUser":1337}}]}}`, "container app: runAsUser 1337"},
		{"a privileged container", `{"spec":{"containers":[{"name":"app","securityContext":{"privileged":true}}]}}`, "privileged"},
		{"a capability over the rules", `{"spec":{"initContainers":[{"name":"net","securityContext":{"capabilities":{"add":["CAP_NET_ADMIN"]}}}],"containers":[{"name":"app"}]}}`, "container net: CAP_NET_ADMIN"},
		{"an application that others reach", `{"metadata":{"annotations":{"sallyport/app":"0.0.0.0:80"}},"spec":{"containers":[{"name":"app"}]}}`, "no address on loopback"},
		{"what is no pod", `"pod"`, "cannot be read"},
	} {
		got := ask(t, tt.pod)
		if got.Allowed || got.Patch != nil || got.Status == nil || !strings.Contains(got.Status.Message, tt.want) {
			t.Errorf("%s: %+v %+v, want %q", tt.name, got, got.Status, tt.want)
		}
	}
}

func TestQuestionsThatAreNone(t *testing.T) {
	for name, body := range map[string]string{
		"no JSON":         `{`,
		"no request":      `{"apiVersion":"admission.k8s.io/v1"}`,
		"no UID":          `{"apiVersion":"admission.k8s.io/v1","request":{}}`,
		"another version": `{"apiVersion":"admission.k8s.io/v1beta1","request":{"uid":"u"}}`,
		"larger than any": `"` + strings.Repeat("x", maxReview) + `"`,
	} {
		w := httptest.NewRecorder()
		testHook().ServeHTTP(w, httptest.NewRequest(http.MethodPost, "/mutate", strings.NewReader(body)))
		if w.Code < 400 || w.Code > 499 {
			t.Errorf("%s: %d %s", name, w.Code, w.Body)
		}
	}
	// What is asked of something else passes as it is.
	out := testHook().answer(&request{UID: "u", Operation: "DELETE"})
	if !out.Allowed || out.Patch != nil {
		t.Errorf("%+v", out)
	}
}

func FuzzReview(f *testing.F) {
	f.Add(`{"spec":{"containers":[{"name":"app"}]}}`)
	f.Add(`{"metadata":{"annotations":{"sallyport/app":"127.0.0.1:8080"}},"spec":{"volumes":[{"name":"v"}]}}`)
	f.Fuzz(func(t *testing.T, pod string) {
		if !json.Valid([]byte(pod)) {
			return
		}
		in := &request{UID: "u", Operation: "CREATE", Object: json.RawMessage(pod)}
		in.Kind.Kind = "Pod"
		if out := testHook().answer(in); out.Allowed == (out.Status != nil) {
			t.Errorf("%+v", out)
		}
	})
}

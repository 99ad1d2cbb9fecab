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
	c := &Config{Image: "sallyport:test", OptOut: []string{"tools"}}
	c.fill()
	return &hook{cfg: c, log: slog.New(slog.DiscardHandler)}
}

// ask sends a pod that is made as Kubernetes does.
func ask(t *testing.T, pod string) *response {
	t.Helper()
	return send(t, "shop", "CREATE", "", pod)
}

func send(t *testing.T, namespace, operation, sub, pod string) *response {
	t.Helper()
	body := fmt.Sprintf(`{"apiVersion":"admission.k8s.io/v1","kind":"AdmissionReview","request":{"uid":"u-1","kind":{"group":"","version":"v1","kind":"Pod"},"subResource":%q,"namespace":%q,"operation":%q,"object":%s}}`, sub, namespace, operation, pod)
	w := httptest.NewRecorder()
	testHook().ServeHTTP(w, httptest.NewRequest(http.MethodPost, "/mutate", strings.NewReader(body)))
	var out review
	if err := json.Unmarshal(w.Body.Bytes(), &out); err != nil || w.Code != http.StatusOK || out.Response == nil || out.Response.UID != "u-1" || out.Kind != "AdmissionReview" {
		t.Fatalf("%d %s: %v", w.Code, w.Body, err)
	}
	return out.Response
}

// meek is the security context of a container that cannot get around its sidecar.
const meek = `"securityContext":{"runAsUser":10001,"allowPrivilegeEscalation":false,"capabilities":{"drop":["ALL"]}}`

// TestPatch holds what is added to a pod to golden files, which the test of the
// manifests applies and reads as Kubernetes would.
func TestPatch(t *testing.T) {
	for name, pod := range map[string]string{
		"bare":   `{"metadata":{},"spec":{"containers":[{"name":"app",` + meek + `}]}}`,
		"serves": `{"metadata":{"annotations":{"sallyport/app":"127.0.0.1:8080"}},"spec":{"initContainers":[{"name":"migrate",` + meek + `}],"containers":[{"name":"app","env":[{"name":"A"}],"volumeMounts":[{"name":"v"}],` + meek + `},{"name":"log",` + meek + `}],"volumes":[{"name":"v"}]}}`,
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

func TestPodsThatAreRefused(t *testing.T) {
	for _, tt := range []struct{ name, pod, want string }{
		{"the network of the node", `{"spec":{"hostNetwork":true,"containers":[{"name":"app"}]}}`, "hostNetwork"},
		{"processes apart", `{"spec":{"shareProcessNamespace":false,"containers":[{"name":"app"}]}}`, "shareProcessNamespace"},
		{"the sidecar's user, of the pod", `{"spec":{"securityContext":{"runAsUser":1337},"containers":[{"name":"app"}]}}`, "runAsUser 1337"},
		{"the sidecar's user, of a container", `{"spec":{"containers":[{"name":"app","securityContext":{"runAsUser":1337}}]}}`, "container app: runAsUser 1337"},
		{"a user that the image names", `{"spec":{"containers":[{"name":"app","securityContext":{"allowPrivilegeEscalation":false,"capabilities":{"drop":["ALL"]}}}]}}`, "container app: without runAsUser"},
		{"root", `{"spec":{"securityContext":{"runAsUser":10001},"containers":[{"name":"app","securityContext":{"runAsUser":0}}]}}`, "container app: runAsUser 0"},
		{"the capabilities of default", `{"spec":{"securityContext":{"runAsUser":10001},"containers":[{"name":"app","securityContext":{"allowPrivilegeEscalation":false}}]}}`, "set capabilities: {drop: [ALL]}"},
		{"two of three dropped", `{"spec":{"containers":[{"name":"app","securityContext":{"runAsUser":1,"allowPrivilegeEscalation":false,"capabilities":{"drop":["SETUID","NET_RAW"]}}}]}}`, "or drop NET_RAW, SETUID, SETGID"},
		{"a program with the setuid bit", `{"spec":{"containers":[{"name":"app","securityContext":{"runAsUser":1,"capabilities":{"drop":["ALL"]}}}]}}`, "set allowPrivilegeEscalation: false"},
		{"no annotation gets it out", `{"metadata":{"annotations":{"sallyport/inject":"false"}},"spec":{"containers":[{"name":"app",` + meek + `}]}}`, "opt_out"},
		{"the sidecar's name", `{"spec":{"containers":[{"name":"sallyport-sidecar",` + meek + `}]}}`, "container sallyport-sidecar: names that begin with"},
		{"the sidecar's name, first", `{"spec":{"initContainers":[{"name":"sallyport-sidecar"}],"containers":[{"name":"app",` + meek + `}]}}`, "init container sallyport-capture: not in its place"},
		{"the sidecar's volume", `{"spec":{"containers":[{"name":"app",` + meek + `}],"volumes":[{"name":"sallyport-state"}]}}`, "volume sallyport-state"},
		{"what the sidecar mounts", `{"spec":{"containers":[{"name":"app","volumeMounts":[{"name":"sallyport-token","mountPath":"/t"}],` + meek + `}]}}`, "it mounts sallyport-token"},
		{"the Workload API, to write", `{"spec":{"containers":[{"name":"app","volumeMounts":[{"name":"sallyport-workload","mountPath":"/run/sallyport/workload"}],` + meek + `}]}}`, "it mounts sallyport-workload"},
		{"a token like the sidecar's", `{"spec":{"containers":[{"name":"app",` + meek + `}],"volumes":[{"name":"t","projected":{"sources":[{"serviceAccountToken":{"audience":"spire-server"}}]}}]}}`, "volume t: a token for spire-server"},
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

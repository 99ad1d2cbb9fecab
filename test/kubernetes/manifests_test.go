// Package kubernetes reads the manifests of deploy/ and the pods that the
// injector makes by the types of Kubernetes itself, which the house does not
// link: a module of its own. "make kubernetes-test".
package kubernetes

import (
	"encoding/json"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	jsonpatch "github.com/evanphx/json-patch/v5"
	admission "k8s.io/api/admissionregistration/v1"
	apps "k8s.io/api/apps/v1"
	core "k8s.io/api/core/v1"
	rbac "k8s.io/api/rbac/v1"
	meta "k8s.io/apimachinery/pkg/apis/meta/v1"
	"sigs.k8s.io/yaml"
)

// kinds are what the manifests may hold.
var kinds = map[string]func() any{
	"Namespace": func() any { return new(core.Namespace) }, "ServiceAccount": func() any { return new(core.ServiceAccount) },
	"ConfigMap": func() any { return new(core.ConfigMap) }, "Service": func() any { return new(core.Service) },
	"ClusterRole": func() any { return new(rbac.ClusterRole) }, "ClusterRoleBinding": func() any { return new(rbac.ClusterRoleBinding) },
	"StatefulSet": func() any { return new(apps.StatefulSet) }, "Deployment": func() any { return new(apps.Deployment) },
	"MutatingWebhookConfiguration": func() any { return new(admission.MutatingWebhookConfiguration) },
}

func TestManifests(t *testing.T) {
	files, err := filepath.Glob("../../deploy/kubernetes/*.yaml")
	if err != nil || len(files) == 0 {
		t.Fatalf("%v %v", files, err)
	}
	for _, file := range files {
		b, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		for _, doc := range strings.Split(string(b), "\n---\n") {
			var m meta.TypeMeta
			if err := yaml.Unmarshal([]byte(doc), &m); err != nil {
				t.Fatalf("%s: %v", file, err)
			}
			make, known := kinds[m.Kind]
			if !known {
				t.Errorf("%s: %q is no kind that is read here", file, m.Kind)
				continue
			}
			v := make()
			if err := yaml.UnmarshalStrict([]byte(doc), v, yaml.DisallowUnknownFields); err != nil {
				t.Errorf("%s: %s: %v", file, m.Kind, err)
				continue
			}
			look(t, file, v)
		}
	}
}

// look holds an object to what is promised of it.
func look(t *testing.T, file string, v any) {
	switch o := v.(type) {
	case *core.ConfigMap:
		for name, text := range o.Data {
			if program, ok := strings.CutSuffix(name, ".yaml"); ok && o.Name != "policies" {
				checkConfig(t, file, program, text)
			}
		}
		if o.Name == "policies" {
			lint(t, file, o.Data)
		}
	case *apps.StatefulSet:
		unprivileged(t, file, o.Spec.Template)
	case *apps.Deployment:
		if o.Namespace == "sallyport" {
			unprivileged(t, file, o.Spec.Template)
		}
	case *admission.MutatingWebhookConfiguration:
		for _, w := range o.Webhooks {
			if w.FailurePolicy == nil || *w.FailurePolicy != admission.Fail || w.SideEffects == nil {
				t.Errorf("%s: %s lets pods pass that nobody has looked at", file, w.Name)
			}
		}
		for _, heard := range []struct {
			what admission.OperationType
			of   string
		}{{admission.Create, "pods"}, {admission.Update, "pods/ephemeralcontainers"}, {admission.Update, "pods"}} {
			if !slices.ContainsFunc(o.Webhooks, func(w admission.MutatingWebhook) bool {
				return slices.ContainsFunc(w.Rules, func(r admission.RuleWithOperations) bool {
					return slices.Contains(r.Resources, heard.of) && slices.Contains(r.Operations, heard.what)
				})
			}) {
				t.Errorf("%s: nobody hears of %s of %s", file, heard.what, heard.of)
			}
		}
	}
}

func unprivileged(t *testing.T, file string, p core.PodTemplateSpec) {
	s := p.Spec.SecurityContext
	if s == nil || s.RunAsNonRoot == nil || !*s.RunAsNonRoot || s.SeccompProfile == nil {
		t.Errorf("%s: a pod may run as root, or without seccomp", file)
	}
	for _, c := range p.Spec.Containers {
		x := c.SecurityContext
		if x == nil || x.AllowPrivilegeEscalation == nil || *x.AllowPrivilegeEscalation || x.Capabilities == nil || len(x.Capabilities.Drop) == 0 ||
			x.ReadOnlyRootFilesystem == nil || !*x.ReadOnlyRootFilesystem {
			t.Errorf("%s: container %s is not confined", file, c.Name)
		}
	}
}

func program(t *testing.T, args ...string) (string, error) {
	t.Helper()
	dir := os.Getenv("PROGRAMS")
	if dir == "" {
		if os.Getenv("CI") == "true" {
			t.Fatal("PROGRAMS is not set; next: make kubernetes-test")
		}
		t.Skip("run by make kubernetes-test, which builds the programs")
	}
	out, err := exec.Command(filepath.Join(dir, args[0]), args[1:]...).CombinedOutput()
	return string(out), err
}

func checkConfig(t *testing.T, file, name, text string) {
	f := filepath.Join(t.TempDir(), name+".yaml")
	if err := os.WriteFile(f, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	if out, err := program(t, name, "run", "--config", f, "--check-config"); err != nil {
		t.Errorf("%s: %s.yaml: %v: %s", file, name, err, out)
	}
}

func lint(t *testing.T, file string, data map[string]string) {
	dir := t.TempDir()
	for name, text := range data {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	// A remark, such as that a row has no test, ends it with 1.
	if out, err := program(t, "sallyport", "policy", "lint", dir, "--trust-domain", "corp.example"); err != nil && !strings.Contains(out, "findings to look at") {
		t.Errorf("%s: %v: %s", file, err, out)
	}
}

// TestInjected applies what the injector adds, and reads the pod strictly.
func TestInjected(t *testing.T) {
	files, err := filepath.Glob("../../cmd/injector/testdata/*.golden.json")
	if err != nil || len(files) == 0 {
		t.Fatalf("%v %v", files, err)
	}
	for _, file := range files {
		b, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		var g struct{ Pod, Patch json.RawMessage }
		if err := json.Unmarshal(b, &g); err != nil {
			t.Fatal(err)
		}
		patch, err := jsonpatch.DecodePatch(g.Patch)
		if err != nil {
			t.Fatal(err)
		}
		out, err := patch.Apply(g.Pod)
		if err != nil {
			t.Fatalf("%s: %v", file, err)
		}
		var p core.Pod
		if err := yaml.UnmarshalStrict(out, &p, yaml.DisallowUnknownFields); err != nil {
			t.Fatalf("%s: %v", file, err)
		}
		first, second := p.Spec.InitContainers[0], p.Spec.InitContainers[1]
		if first.Name != "sallyport-capture" || second.Name != "sallyport-sidecar" || second.RestartPolicy == nil || *second.RestartPolicy != core.ContainerRestartPolicyAlways {
			t.Errorf("%s: the rules come first, then a native sidecar, and not %s, %s", file, first.Name, second.Name)
		}
		if s := second.SecurityContext; s == nil || s.RunAsUser == nil || *s.RunAsUser != 1337 || s.Capabilities == nil || len(s.Capabilities.Add) > 0 {
			t.Errorf("%s: the sidecar is not confined", file)
		}
		volumes := map[string]bool{}
		for _, v := range p.Spec.Volumes {
			volumes[v.Name] = true
		}
		for _, c := range append(p.Spec.InitContainers, p.Spec.Containers...) {
			for _, m := range c.VolumeMounts {
				if !volumes[m.Name] {
					t.Errorf("%s: container %s mounts %q, which is no volume", file, c.Name, m.Name)
				}
			}
		}
	}
}

package main

import (
	"encoding/json"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"testing"
)

// injected is a pod as Kubernetes has it after the injector and its own defaults.
func injected(t *testing.T, app string) map[string]any {
	t.Helper()
	var p any
	if err := json.Unmarshal([]byte(app), &p); err != nil {
		t.Fatal(err)
	}
	got := ask(t, app)
	var ops []operation
	if err := json.Unmarshal(got.Patch, &ops); err != nil || len(ops) == 0 {
		t.Fatalf("%+v %+v: %v", got, got.Status, err)
	}
	for _, o := range ops {
		p = put(p, strings.Split(o.Path, "/")[1:], o.Value)
	}
	pod := p.(map[string]any)
	for _, c := range at(pod, "spec", "initContainers").([]any)[:2] {
		c := c.(map[string]any)
		c["imagePullPolicy"], c["terminationMessagePath"] = "IfNotPresent", "/dev/termination-log"
		c["resources"] = map[string]any{"limits": map[string]any{"cpu": "1"}}
		c["volumeMounts"] = append(at(c, "volumeMounts").([]any), map[string]any{"name": "kube-api-access-x", "mountPath": accountDir, "readOnly": true})
		at(c, "securityContext").(map[string]any)["procMount"] = "Default"
	}
	return pod
}

// put adds as JSON Patch does.
func put(in any, path []string, v any) any {
	switch x := in.(type) {
	case map[string]any:
		key := strings.ReplaceAll(path[0], "~1", "/")
		if len(path) > 1 {
			v = put(x[key], path[1:], v)
		}
		x[key] = v
		return x
	case []any:
		i, err := strconv.Atoi(path[0])
		switch {
		case err != nil:
			return append(x, v)
		case len(path) > 1:
			x[i] = put(x[i], path[1:], v)
			return x
		default:
			return slices.Insert(x, i, v)
		}
	}
	return nil
}

// at finds a value by keys and indices.
func at(in any, path ...any) any {
	for _, p := range path {
		switch k := p.(type) {
		case string:
			in = in.(map[string]any)[k]
		case int:
			in = in.([]any)[k]
		}
	}
	return in
}

func text(t *testing.T, v any) string {
	t.Helper()
	b, err := json.Marshal(v)
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}

const served = `{"metadata":{"annotations":{"sallyport/app":"127.0.0.1:8080"}},"spec":{"initContainers":[{"name":"migrate",` + meek + `}],"containers":[{"name":"app",` + meek + `}]}}`

// TestPodsThatHaveASidecar asks again, as Kubernetes does when another webhook has
// changed the pod, and as whoever writes the sidecar by hand would.
func TestPodsThatHaveASidecar(t *testing.T) {
	if got := ask(t, text(t, injected(t, served))); !got.Allowed || got.Patch != nil {
		t.Fatalf("its own pod: %+v %+v", got, got.Status)
	}
	sidecar := []any{"spec", "initContainers", 1}
	for _, tt := range []struct {
		name   string
		change func(pod map[string]any)
		want   string
	}{
		{"another image", func(p map[string]any) { at(p, sidecar...).(map[string]any)["image"] = "evil" }, "init container sallyport-sidecar: image"},
		{"another command", func(p map[string]any) { at(p, sidecar...).(map[string]any)["command"] = []any{"/sh"} }, "init container sallyport-sidecar: command"},
		{"a hook that runs as it", func(p map[string]any) { at(p, sidecar...).(map[string]any)["lifecycle"] = map[string]any{} }, "init container sallyport-sidecar: lifecycle"},
		{"another configuration", func(p map[string]any) {
			c := at(p, "spec", "initContainers", 0).(map[string]any)
			c["env"] = []any{map[string]any{"name": "SALLYPORT_CAPTURE_EVERYONE", "value": "false"}}
		}, "init container sallyport-capture: env"},
		{"another map of it", func(p map[string]any) {
			at(p, "spec", "volumes", 0, "configMap").(map[string]any)["name"] = "mine"
		}, "volume sallyport-config: configMap name"},
		{"another user", func(p map[string]any) {
			at(p, append(sidecar, "securityContext")...).(map[string]any)["runAsUser"] = 0
		}, "init container sallyport-sidecar: securityContext runAsUser"},
		{"its disk in a directory of the node", func(p map[string]any) {
			v := at(p, "spec", "volumes", 2).(map[string]any)
			delete(v, "emptyDir")
			v["hostPath"] = map[string]any{"path": "/tmp"}
		}, "volume sallyport-state:"},
		{"a container before the rules", func(p map[string]any) {
			list := at(p, "spec", "initContainers").([]any)
			list[0], list[2] = list[2], list[0]
		}, "init container sallyport-capture: not in its place"},
		{"no volume", func(p map[string]any) {
			s := p["spec"].(map[string]any)
			s["volumes"] = s["volumes"].([]any)[1:]
		}, "volume sallyport-config: missing"},
		{"a container that came since", func(p map[string]any) {
			s := p["spec"].(map[string]any)
			s["containers"] = append(s["containers"].([]any), map[string]any{"name": "late"})
		}, "container late: without runAsUser"},
		{"the sidecar's keys", func(p map[string]any) {
			c := at(p, "spec", "containers", 0).(map[string]any)
			c["volumeMounts"] = append(c["volumeMounts"].([]any), map[string]any{"name": "sallyport-state", "mountPath": "/s"})
		}, "container app: it mounts sallyport-state"},
		{"processes apart", func(p map[string]any) { delete(p["spec"].(map[string]any), "shareProcessNamespace") }, "shareProcessNamespace"},
	} {
		p := injected(t, served)
		tt.change(p)
		if got := ask(t, text(t, p)); got.Allowed || got.Status == nil || !strings.Contains(got.Status.Message, tt.want) {
			t.Errorf("%s: %+v %+v, want %q", tt.name, got, got.Status, tt.want)
		}
	}
}

// TestContainersThatComeLater are those of "kubectl debug".
func TestContainersThatComeLater(t *testing.T) {
	for _, tt := range []struct{ name, container, want string }{
		{"one that can do nothing", `{"name":"debugger-1",` + meek + `}`, ""},
		{"one that looks into others", `{"name":"debugger-1","securityContext":{"runAsUser":1,"allowPrivilegeEscalation":false,"capabilities":{"drop":["ALL"],"add":["SYS_PTRACE"]}}}`, "SYS_PTRACE"},
		{"the sidecar's user", `{"name":"debugger-1","securityContext":{"runAsUser":1337}}`, "runAsUser 1337"},
		{"the sidecar's token", `{"name":"debugger-1","volumeMounts":[{"name":"sallyport-token","mountPath":"/t"}],` + meek + `}`, "it mounts sallyport-token"},
	} {
		p := injected(t, served)
		var c any
		if err := json.Unmarshal([]byte(tt.container), &c); err != nil {
			t.Fatal(err)
		}
		p["spec"].(map[string]any)["ephemeralContainers"] = []any{c}
		got := send(t, "shop", "UPDATE", "ephemeralcontainers", text(t, p))
		if got.Patch != nil || got.Allowed != (tt.want == "") || !got.Allowed && !strings.Contains(got.Status.Message, tt.want) {
			t.Errorf("%s: %+v %+v, want %q", tt.name, got, got.Status, tt.want)
		}
	}
}

func TestPodsThatAreLeftAlone(t *testing.T) {
	const out = `{"metadata":{"annotations":{"sallyport/inject":"false"}},"spec":{"hostNetwork":true,"containers":[{"name":"app"}],"ephemeralContainers":[{"name":"debugger-1"}]}}`
	for _, tt := range []struct{ name, operation, sub string }{
		{"one that wants no sidecar, where it may say so", "CREATE", ""},
		{"a container that comes into it", "UPDATE", "ephemeralcontainers"},
		{"another subresource", "CREATE", "binding"},
	} {
		if got := send(t, "tools", tt.operation, tt.sub, out); !got.Allowed || got.Patch != nil {
			t.Errorf("%s: %+v %+v", tt.name, got, got.Status)
		}
	}
}

// TestImagesOfARunningPod changes what "kubectl set image" does.
func TestImagesOfARunningPod(t *testing.T) {
	pod := func(sidecar, capture, app string) string {
		return fmt.Sprintf(`{"spec":{"initContainers":[{"name":"sallyport-capture","image":%q},{"name":"sallyport-sidecar","image":%q}],"containers":[{"name":"app","image":%q}]}}`, capture, sidecar, app)
	}
	update := func(before, after string) *response {
		return testHook().answer(&request{UID: "u", Kind: struct{ Group, Version, Kind string }{"", "v1", "Pod"}, Namespace: "shop", Operation: "UPDATE", Object: []byte(after), OldObject: []byte(before)})
	}
	old := pod("sallyport:old", "sallyport:old", "app:1")
	for name, tt := range map[string]struct {
		after string
		ok    bool
	}{
		"nothing":                        {old, true},
		"that of the application":        {pod("sallyport:old", "sallyport:old", "app:2"), true},
		"the sidecar's to that of today": {pod("sallyport:test", "sallyport:old", "app:1"), true},
		"the sidecar's":                  {pod("evil", "sallyport:old", "app:1"), false},
		"that of capture":                {pod("sallyport:old", "evil", "app:1"), false},
		"a pod that is none":             {`{"spec":[]}`, false},
	} {
		if got := update(old, tt.after); got.Allowed != tt.ok || (got.Status == nil) != tt.ok {
			t.Errorf("another image, %s: %+v", name, got)
		}
	}
	bare := `{"spec":{"containers":[{"name":"app","image":"a"}]}}`
	if got := update(bare, strings.Replace(bare, `"a"`, `"b"`, 1)); !got.Allowed {
		t.Errorf("a pod without a sidecar: %+v", got.Status)
	}
	if got := update(`x`, old); got.Allowed {
		t.Error("a pod that cannot be compared is let through")
	}
}

while /tools/busybox touch /alive/loop && /tools/busybox sleep 2; do
  tainted=$(kubectl get nodes --output go-template='{{range .items}}{{$name := .metadata.name}}
    {{range .spec.taints}}{{if eq .key "awsvid.io/not-ready"}}{{$name}}{{end}}{{end}} {{end}}')
  [ -n "$(echo $tainted)" ] || continue
  ready=$(kubectl get pods --namespace NAMESPACE --selector app.kubernetes.io/name=awsvid --output \
    go-template='{{range .items}}{{$name := .spec.nodeName}}
    {{range .status.conditions}}{{if and (eq .type "Ready") (eq .status "True")}}{{$name}}{{end}}{{end}} {{end}}')
  for node in $ready; do
    case " $(echo $tainted) " in *" $node "*) kubectl taint node "$node" awsvid.io/not-ready- ;; esac
  done
done
